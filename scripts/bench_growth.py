"""How costs grow with the number of images, of classes, of runs and of channels.

    python scripts/bench_growth.py          with --device cpu | cuda, --output FILE

Each row has the exponent p of cost ~ n^p between the two largest sizes, and the seconds of all sizes. The largest sizes
count because constant costs make the exponent of small sizes look small.
"""

import io
import math
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
import torch
from PIL import Image
from torch import nn

from bench_startup import write_records
from bench_step import batch_of
from benchmarking import Report, arguments
from delta_transfer.common.timing import seconds_of
from delta_transfer.data import load_dataset
from delta_transfer.data.readers.folder import FolderConfig
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.methods.attention import channel_importance
from delta_transfer.methods.base import Batch
from delta_transfer.methods.l2 import L2
from delta_transfer.models import Network
from delta_transfer.models.zoo import SmallResNet
from delta_transfer.records.reading import read_all
from delta_transfer.reporting.comparison import compare


def main() -> None:
    options = arguments(__doc__.splitlines()[0], one_thread=True)
    report = Report(options)
    for what, sizes, quick, measure in (
        ("images", (1000, 10_000, 100_000), (20, 40), read_images),
        ("classes", (2, 10, 100, 1000), (2, 4), step),
        ("runs", (10, 100, 1000, 3000), (10, 20), compare_runs),
        ("channels", (64, 128, 256, 512), (4, 8), remove_channels),
    ):
        seconds = {size: measure(size, options.device) for size in (quick if options.quick else sizes)}
        report.add(f"growth_{what}", exponent(seconds), f"{measure.__doc__.splitlines()[0]} {listed(seconds)}")
    report.write()


def exponent(seconds: dict[int, float]) -> float:
    """p of cost ~ n^p between the two largest sizes."""
    (small, less), (large, more) = sorted(seconds.items())[-2:]
    return math.log(more / less) / math.log(large / small)


def listed(seconds: dict[int, float]) -> str:
    return ", ".join(f"{size:,}: {taken:.3g} s" for size, taken in seconds.items())


def timed(work: Callable[[], object]) -> float:
    """Processor seconds of the faster of two repetitions."""
    found = []
    for _ in range(2):
        began = process_time()
        work()
        found.append(process_time() - began)
    return min(found)


def read_images(count: int, device: torch.device) -> float:
    """Reading the list of a folder of images, in ten classes, as each run does."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8) + np.arange(8, dtype=np.uint8)[:, None]).save(picture, "JPEG")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            path = Path(folder) / ("train", "test")[number % 2] / f"class_{number // 2 % 10}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.getvalue())
        config = FolderConfig(reader="folder", name="images", root=folder)
        return timed(lambda: load_dataset(config, remark=lambda sentence: None))


def step(classes: int, device: torch.device) -> float:
    """A training step of L2, small_resnet, 32 images of 32 pixels."""
    target = Network(SmallResNet(classes), "fc").to(device, memory_format=torch.channels_last).train()
    method = L2()
    method.setup(target)
    optimizer = make_optimizer(target, method, SGDConfig(), ScheduleConfig(iterations=1))
    state, batch = TrainState(target, None, optimizer, "fp32"), Batch(*batch_of(32, 32, device))
    batch.labels.remainder_(classes)
    return seconds_of(lambda: train_step(state, method, batch), device)


def compare_runs(count: int, device: torch.device) -> float:
    """Reading the records of finished runs and comparing their methods."""
    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder), seeds=2, strengths=count // 10, lines=0)
        return timed(lambda: compare(read_all([Path(folder)])[0]))


def remove_channels(channels: int, device: torch.device) -> float:
    """Exact attention of 4 images of 16 pixels: each channel of a convolution removed in front of another as wide."""
    layers = {"first": nn.Conv2d(3, channels, 3), "relu": nn.ReLU(), "second": nn.Conv2d(channels, channels, 3)}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, 10)}
    probe = Network(nn.Sequential(OrderedDict(layers)), "fc", ("first",)).to(device).freeze().eval()
    images, labels = batch_of(4, 16, device)
    return seconds_of(lambda: channel_importance(probe, [(images, labels % 10)], len(labels)), device)


if __name__ == "__main__":
    main()

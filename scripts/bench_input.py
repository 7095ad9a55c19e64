"""Measures the speed of input: training from the store, training on one batch in memory, and a DataLoader.

    python scripts/bench_input.py --output FILE.json

The images are synthetic JPEGs of about the size of CUB's, in a temporary folder.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarking import Report, arguments, side_by_side
from delta_transfer.data import Dataset
from delta_transfer.data.files import from_files
from delta_transfer.data.loader import Loader
from delta_transfer.data.store import open_store
from delta_transfer.engine.devices import pick_precision
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.methods.base import Batch
from delta_transfer.methods.l2 import L2
from delta_transfer.models import Network

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Sizes:
    network: str
    train_batch: int
    steps: int
    photos: int  # different ones
    photo: tuple[int, int]  # their width and height
    resize: int
    crop: int
    batch: int
    batches_per_core: int  # in a pass, so that every worker of the DataLoader gets as many
    passes: int


def sizes(device: torch.device, quick: bool) -> Sizes:
    if quick:
        return Sizes("resnet18", 4, 2, 8, (100, 75), 40, 32, 4, 1, 1)
    network, batch, steps = ("resnet50", 64, 20) if device.type == "cuda" else ("resnet18", 16, 16)
    return Sizes(network, batch, steps, 256, (500, 375), 256, 224, 64, 4, 3 if device.type == "cuda" else 6)


def main() -> None:
    options = arguments("Measure how fast images come from the store, beside memory and beside a DataLoader.")
    report = Report(options)
    size = sizes(options.device, options.quick)
    with tempfile.TemporaryDirectory() as folder:
        dataset = photos(Path(folder) / "photos", size)
        training(report, dataset, Path(folder) / "cache", size)
        passes(report, dataset, Path(folder), size)
    report.write()


def training(report: Report, dataset: Dataset, cache: Path, size: Sizes) -> None:
    """Compares a step of one network on the store's next batch with a step on a batch in memory."""
    device = report.options.device
    loader, indices = loader_of(dataset, cache, size, size.train_batch, device), np.arange(len(dataset.labels))
    model = torchvision.models.get_model(size.network, num_classes=len(dataset.classes))
    target = Network(model, "fc").to(device, memory_format=torch.channels_last).train()
    method = L2()
    schedule = ScheduleConfig(iterations=size.steps, lr=1e-4)
    precision = pick_precision("auto", device)
    state = TrainState(target, None, make_optimizer(target, method, SGDConfig(), schedule), precision)
    held = Batch(*loader.train_batch(indices, 0))
    numbers = iter(range(10**9))
    works = {
        "store": lambda: train_step(state, method, Batch(*loader.train_batch(indices, next(numbers)))),
        "memory": lambda: train_step(state, method, held),
    }
    timings = side_by_side(works, device, size.steps, warm_up=1 if device.type == "cpu" else 20)
    ratio = timings.ratio("memory", "store", wall=True)  # making a batch is not spread over the cores as a step is
    detail = f"images/s from the store / from memory; {size.network}, batch {size.train_batch}, {precision}; {ratio}"
    report.add("input_training", ratio.value, detail)


def passes(report: Report, dataset: Dataset, folder: Path, size: Sizes) -> None:
    """Compares passes over all images: through the store, through a DataLoader, and to build the store."""
    device, count = report.options.device, len(dataset.labels)
    loader, indices = loader_of(dataset, folder / "cache", size, size.batch, device), np.arange(count)
    files = DataLoader(
        Files(dataset, folder / "photos", size),
        size.batch,
        shuffle=True,
        num_workers=CORES,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )

    def from_files() -> None:
        for images, labels in files:
            images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def from_store() -> None:
        for iteration in range(len(files)):
            loader.train_batch(indices, iteration)

    def build() -> None:
        open_store(dataset, size.resize, "squash", folder / "fresh")
        shutil.rmtree(folder / "fresh")

    works = {"files": from_files, "store": from_store, "build": build}
    wall = side_by_side(works, device, size.passes, long=True).wall
    # Every pass does the same, and other work on the machine only adds time, so that the shortest pass counts.
    seconds = {name: min(times) for name, times in wall.items()}
    rate = {name: f"{count / each:,.0f} images/s" for name, each in seconds.items()}
    best = f"best of {size.passes} passes over {count} JPEGs each, {CORES} cores"
    detail = f"images/s of Loader ({rate['store']}) / of DataLoader ({rate['files']}); {best}"
    report.add("input_dataloader", seconds["files"] / seconds["store"], detail)
    detail = f"a pass of DataLoader ({seconds['files']:.2f} s) / building the store ({seconds['build']:.2f} s); {best}"
    report.add("input_store", seconds["files"] / seconds["build"], detail)


def loader_of(dataset: Dataset, cache: Path, size: Sizes, batch_size: int, device: torch.device) -> Loader:
    store = open_store(dataset, size.resize, "squash", cache)
    look = {"crop": size.crop, "mirror": True, "mean": MEAN, "std": STD}
    return Loader(store, dataset.labels, **look, batch_size=batch_size, seed=0, device=device)


class Files(torch.utils.data.Dataset):
    """A usual Dataset: the same crops, cut from the JPEG every time."""

    def __init__(self, dataset: Dataset, folder: Path, size: Sizes):
        self.paths, self.labels = [folder / name for name in dataset.names], dataset.labels
        steps = [transforms.Resize((size.resize, size.resize)), transforms.RandomCrop(size.crop)]
        steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), self.labels[index]


def photos(folder: Path, size: Sizes) -> Dataset:
    """`size.photos` JPEGs, named again and again until all cores have enough to do."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(size.photos):
        photo(random, *size.photo).save(folder / f"{number}.jpg", quality=90)
    names = [f"{i % size.photos}.jpg" for i in range(size.batch * size.batches_per_core * CORES)]
    labels = np.arange(len(names)) % 10
    return from_files("photos", folder, list("abcdefghij"), names, labels, [False] * len(names), "the benchmark")


def photo(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Shapes of three scales, and noise, so that a file is as large and as slow to decode as a photo's."""
    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for cells, contrast in ((4, 60), (16, 30), (64, 12)):
        coarse = random.normal(0, contrast, (3, cells, cells)).astype(np.float32)
        planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in coarse]
        pixels += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    pixels += random.normal(0, 7, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()

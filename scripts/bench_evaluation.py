"""Compares the cost of an evaluation with its bare forward passes, and ten crops with one.

    python scripts/bench_evaluation.py --output FILE.json

The network is untrained and the images are noise, which does not change the cost.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torchvision

from benchmarking import Report, arguments, side_by_side
from delta_transfer.data.loader import Loader
from delta_transfer.data.store import Store
from delta_transfer.engine.devices import full_precision
from delta_transfer.engine.tasks import evaluate
from delta_transfer.models import Network


@dataclass(frozen=True)
class Sizes:
    network: str
    images: int
    resize: int
    crop: int
    rounds: int
    rounds_of_ten: int  # which take ten times as long


def sizes(device: torch.device, quick: bool) -> Sizes:
    if quick:
        return Sizes("resnet18", 5, 40, 32, 2, 2)
    if device.type == "cuda":
        return Sizes("resnet50", 1280, 256, 224, 5, 3)
    return Sizes("resnet18", 16, 256, 224, 14, 5)


def main() -> None:
    options = arguments("Measure evaluation beside bare forward passes, and ten crops beside one.", one_thread=True)
    report = Report(options)
    size, device = sizes(options.device, options.quick), options.device
    model = torchvision.models.get_model(size.network, num_classes=200)
    network = Network(model, "fc").to(device, memory_format=torch.channels_last).eval()
    indices = np.arange(size.images)
    one, ten = (loader_of(size, device, ten_crops) for ten_crops in (False, True))
    batches = [images for images, _ in one.test_batches(indices)]

    @torch.inference_mode()
    def forward() -> None:
        for images in batches:
            with full_precision(device):
                network(images)["logits"]

    def evaluate_one(times: int = 1) -> None:
        evaluate(network, one, np.tile(indices, times))

    def evaluate_ten() -> None:
        evaluate(network, ten, indices)

    what = f"{size.network}, {size.images} images, at most {one.images_at_once} at once, fp32"
    ratio = side_by_side({"forward": forward, "one": evaluate_one}, device, size.rounds, long=True).ratio(
        "one", "forward"
    )
    report.add("evaluation_forward", ratio.value, f"evaluate / forward passes of its batches; {what}; {ratio}")
    # One crop gets as many views as ten crops, since a short work has faster moments than a long one.
    works = {"one": lambda: evaluate_one(times=10), "ten": evaluate_ten}
    ratio = side_by_side(works, device, size.rounds_of_ten, long=True).ratio("ten", "one")
    detail = f"evaluate with ten crops / with one, of ten times as many images; {what}; {ratio}"
    report.add("evaluation_ten_crops", ratio.value, detail)
    report.write()


def loader_of(size: Sizes, device: torch.device, ten_crops: bool) -> Loader:
    sides = np.full((size.images, 2), size.resize)
    pixels = np.random.default_rng(0).integers(0, 256, (size.images * size.resize**2, 3), dtype=np.uint8)
    return Loader(
        Store(pixels, sides),
        np.arange(size.images) % 200,
        crop=size.crop,
        mirror=True,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        batch_size=64,  # of training
        seed=0,
        device=device,
        ten_crops=ten_crops,
    )


if __name__ == "__main__":
    main()

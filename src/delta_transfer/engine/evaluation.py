"""What a network knows: its outputs on test images, accuracy, and the rates of a verification."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.console import log
from ..common.pair_metrics import pair_metrics
from ..data.dataset import Pairs, Splits
from ..data.loader import Loader
from ..models import Network
from . import devices
from .callbacks import Line


class Evaluator:
    """Measures a target on validation and test images. Nothing is selected: the last measurement is what counts."""

    def __init__(self, loader: Loader, splits: Splits, pairs: Pairs | None, precision: str, measures_test: bool):
        self.loader, self.splits, self.pairs, self.precision = loader, splits, pairs, precision
        self.measured = (["val"] if len(splits.val) else []) + (["test"] if measures_test else [])
        self.latest: dict[str, dict[str, Any]] = {}  # by split

    def __call__(self, target: Network) -> Line:
        """Accuracy in percent, loss and rates, named <split>_<what>."""
        for split in self.measured:
            indices = getattr(self.splits, split)
            if split == "test" and self.pairs is not None:
                self.latest[split] = evaluate_pairs(target, self.loader, indices, self.pairs, self.precision)
            else:
                self.latest[split] = evaluate(target, self.loader, indices, self.precision)
        return self.scalars()

    def scalars(self) -> Line:
        named = {f"{split}_{key}": value for split, found in self.latest.items() for key, value in found.items()}
        return {name: value for name, value in named.items() if isinstance(value, float)}


def evaluate(network: Network, loader: Loader, indices: np.ndarray, precision: str) -> dict[str, Any]:
    """Logits (N, K) fp32, labels (N,), top-1 accuracy in percent and mean cross-entropy on test crops of `indices`."""
    logits, labels = outputs_of(network, loader, indices, precision, "logits")
    return {
        "logits": logits.numpy(),
        "labels": labels.numpy(),
        "top1": 100 * (logits.argmax(dim=1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def evaluate_pairs(
    network: Network, loader: Loader, indices: np.ndarray, pairs: Pairs, precision: str
) -> dict[str, Any]:
    """The similarity (P,) of each pair, which is the cosine of its embeddings, with `pairs` and their rates.

    `indices`: all images of the pairs, ascending; each goes through the network once.
    """
    embeddings, _ = outputs_of(network, loader, indices, precision, "embedding")
    embeddings = F.normalize(embeddings.double())
    first, second = (embeddings[np.searchsorted(indices, images)] for images in (pairs.first, pairs.second))
    similarities = (first * second).sum(dim=1).numpy()
    return {"similarities": similarities, **vars(pairs)} | pair_metrics(similarities, pairs.same, pairs.fold)


@torch.inference_mode()
def outputs_of(
    network: Network, loader: Loader, indices: np.ndarray, precision: str, name: str
) -> tuple[Tensor, Tensor]:
    """What `network` returns as `name` for test crops of `indices`, (N, D) fp32, and the labels (N,), on the CPU.

    Several crops of an image give their mean. Where memory does not suffice, fewer images go through at once from then
    on.
    """
    while True:
        try:
            return _outputs_of(network, loader, indices, precision, name)
        except torch.OutOfMemoryError:
            if loader.images_at_once <= 2:
                raise
            loader.images_at_once //= 2
            log.info(f"Out of memory in the evaluation: it goes on with {loader.images_at_once} images at once")


def _outputs_of(
    network: Network, loader: Loader, indices: np.ndarray, precision: str, name: str
) -> tuple[Tensor, Tensor]:
    network.eval()
    outputs, labels = [], []
    # Every process gets as many images, some of them twice; what is too much is cut off again.
    own = np.resize(indices, -(-len(indices) // devices.processes()) * devices.processes())
    own = np.array_split(own, devices.processes())[devices.rank()]
    for images, batch_labels in loader.test_batches(own):
        with devices.autocast(images.device, precision):
            outputs.append(network(images)[name].float())
        labels.append(batch_labels)
    mean = torch.cat(outputs).view(len(own), -1, outputs[0].shape[1]).mean(dim=1)
    first = torch.cat(labels).view(len(own), -1)[:, 0]
    return devices.gather(mean.cpu())[: len(indices)], devices.gather(first.cpu())[: len(indices)]

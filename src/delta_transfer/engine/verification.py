"""task=verification: classes to train on, and pairs of images of other classes to test on."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.pair_metrics import pair_metrics
from ..data.dataset import Dataset, Pairs
from ..data.loader import BatchSource
from ..models import ArcFaceLoss, CosineHead, Network
from ..records.arrays import SIMILARITIES
from .tasks import TASKS, Classification, Loss, outputs_of, refuse_options_of_classes

if TYPE_CHECKING:
    from .config import RunConfig


class Verification(Classification):
    """ArcFace's loss on the training classes, and the similarities of the pairs."""

    name = "verification"
    measures = ()  # pairs are test data
    outputs = ("pairs", SIMILARITIES)

    def check(self, config: "RunConfig") -> None:
        self.check_inputs(config)
        refuse_options_of_classes(config)

    def head(self, config: "RunConfig") -> Callable[[int, int], nn.Linear]:
        return partial(CosineHead, scale=config.arcface.scale)

    def loss(self, config: "RunConfig", weights: Tensor | None = None) -> Loss:
        return ArcFaceLoss(**vars(config.arcface))

    def measure(
        self, network: Network, loader: BatchSource, dataset: Dataset, split: str, indices: np.ndarray
    ) -> dict[str, Any]:
        if split == "test" and dataset.pairs is not None:
            return evaluate_pairs(network, loader, indices, dataset.pairs)
        return super().measure(network, loader, dataset, split, indices)


def evaluate_pairs(network: Network, loader: BatchSource, indices: np.ndarray, pairs: Pairs) -> dict[str, Any]:
    """The similarity (P,) of each pair, which is the cosine of its embeddings, with `pairs` and their rates.

    indices: all images of the pairs, ascending. Each goes through the network once.
    """
    embeddings, _ = outputs_of(network, loader, indices, "embedding")
    embeddings = F.normalize(embeddings.double())
    first, second = (embeddings[np.searchsorted(indices, images)] for images in (pairs.first, pairs.second))
    similarities = (first * second).sum(dim=1).numpy()
    return {"similarities": similarities, **vars(pairs)} | pair_metrics(similarities, pairs.same, pairs.fold)


TASKS[Verification.name] = Verification()

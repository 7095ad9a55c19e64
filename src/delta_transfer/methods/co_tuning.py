"""Co-Tuning: the target also predicts the source's classes (You, Kou, Long, Wang, NeurIPS 2020)."""

import torch
from torch import Tensor, nn

from ..common.options import option
from ..common.timing import seconds_of
from ..models import Network
from .attention import check_labels
from .base import (
    DECAY,
    METHODS,
    NO_SHAPES,
    Batches,
    MapShapes,
    Needs,
    Outputs,
    Penalty,
    SourceShapes,
    full_precision,
    labels_of,
)


@METHODS.register("co_tuning", "Co-Tuning")
class CoTuning(Penalty):
    """Loss = CE + alpha * mean_b[ -sum_j R[c_b, j] log softmax(s_b)_j ] + beta/2 * ||head||^2.

    s_b (K_s,) are the logits that the source's own head gives for the target's embedding of image b. This head is
    trained with the target, at the learning rate of the backbone. c_b is the image's class. R is (K, K_s): before
    training, its row c is the mean of the source's softmax over the centre crops of the training images of class c.

    Source: Transfer-Learning-Library (thuml/Transfer-Learning-Library at 09d0eb8, talib/finetune/co_tuning.py), with
    its alpha 2.3 and weight decay 5e-4. Deviation: the authors' own code (thuml/CoTuning at 9373eb9,
    module/relationship_learning.py) takes R from a calibrated classifier p(c | j) instead, which has to be chosen on
    validation images; the library's average, which that file has too, needs none. The source weights must include their
    head: with a file that has none, the head stays random. Call `fit` or `load_fitted` before `setup`, and `setup`
    before `penalty`; otherwise they raise RuntimeError. `penalty` returns the terms "source_classes" and "head".
    """

    alpha: float = option(2.3, "strength of the cross-entropy on the source's classes", at_least=0)
    weight_decay: float = option(5e-4, DECAY, at_least=0)

    needs = Needs(source_head=True, fitted="relationship", fit_on="centre crops", one_label=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.head: nn.Linear | None = None

    @torch.no_grad()
    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """R, with weight and bias of the source's head."""
        head = source.traced.get_submodule(source.head)
        sums: Tensor | float = 0.0
        counts: Tensor | float = 0.0
        for images, labels in self.unfinished.counted("of the classes, image", batches):
            check_labels(labels, num_classes)
            of_class = nn.functional.one_hot(labels, num_classes).double()
            sums = sums + of_class.T @ source(images)["logits"].double().softmax(dim=1)
            counts = counts + of_class.sum(dim=0)
        # A class without images has a row of zeros, which adds nothing to the loss.
        relationship = torch.as_tensor(sums) / torch.as_tensor(counts).clamp(min=1)[:, None]
        fitted = {name: p.detach().clone() for name, p in head.named_parameters()}
        fitted = {"relationship": relationship.to(fitted["weight"])} | fitted
        self.load_fitted(fitted)
        return fitted

    def estimate_fit(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        fitted = self.fit(source, [(images, labels)], num_classes)
        with torch.no_grad():
            return fitted, seconds_of(lambda: source(images), images.device) / len(images), 0.0

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        if not self.fitted:
            raise RuntimeError(
                "Co-Tuning does not know how the classes are related: call fit() or load_fitted() before setup()."
            )
        weight, bias = self.fitted["weight"], self.fitted.get("bias")
        self.head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight)
        self.head.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))

    def trained_slowly(self) -> list[nn.Parameter]:
        return self.trained()

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        if self.head is None:
            raise RuntimeError("Co-Tuning has no head for the source's classes: call setup() before penalty().")
        logits = self.head(full_precision(outputs["embedding"]))
        expected = self.fitted["relationship"][labels_of(outputs)]
        loss = nn.functional.cross_entropy(logits, expected)
        return {"source_classes": self.alpha * loss} | self.head_penalty(target)

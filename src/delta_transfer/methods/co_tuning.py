"""Co-Tuning: the source's classes are predicted for the target's images, too (You, Kou, Long, Wang, NeurIPS 2020)."""

import torch
from torch import Tensor, nn

from ..common.hardware import seconds_of
from ..models import Network
from .base import NO_SHAPES, Batches, MapShapes, Outputs, OutputShapes, Regularizer, labels_of, not_negative
from .distances import full_precision


class CoTuning(Regularizer):
    """Loss = CE + alpha * mean_b[ -sum_j R[c_b, j] log softmax(s_b)_j ] + beta/2 * ||head||^2.

    s_b (K_s,) are the logits of the source's own head on the target's embedding of image b; this head is trained with
    the target, at the learning rate of the backbone. c_b is the image's class. R (K, K_s): row c is the mean of the
    source's softmax over the centre crops of the training images of class c, before training.

    Source: Transfer-Learning-Library, with its alpha 2.3 and weight decay 5e-4. The authors' own code (thuml/CoTuning)
    takes R from a calibrated classifier p(c | j) instead, which is not what is done here. The weights have to bring
    their head: a file without one leaves it random. Call `fit` or `load_fitted` before `start`.
    """

    fitted_name = "relationship"
    fits_plain = True

    def __init__(self, alpha: float = 2.3, beta: float = 0.0, weight_decay: float = 5e-4):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha)
        self.alpha = alpha
        self.fitted: dict[str, Tensor] = {}
        self.head: nn.Linear | None = None

    @torch.no_grad()
    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """R, and weight and bias of the source's head."""
        sums, counts = 0.0, 0.0
        for images, labels in batches:
            of_class = nn.functional.one_hot(labels, num_classes).double()
            sums = sums + of_class.T @ source(images)["logits"].double().softmax(dim=1)
            counts = counts + of_class.sum(dim=0)
        head = source.traced.get_submodule(source.head)
        relationship = sums / counts.clamp(min=1)[:, None]  # of a class without images 0: nothing is asked
        fitted = {"relationship": relationship.to(head.weight)}
        fitted |= {name: p.detach().clone() for name, p in head.named_parameters()}
        self.load_fitted(fitted)
        return fitted

    def rehearse(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        fitted = self.fit(source, [(images, labels)], num_classes)
        with torch.no_grad():
            return fitted, seconds_of(lambda: source(images), images.device) / len(images), 0.0

    def load_fitted(self, fitted: dict[str, Tensor]) -> None:
        self.fitted = dict(fitted)

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        if not self.fitted:
            raise RuntimeError(
                "Co-Tuning has no relationship of the classes: call fit() or load_fitted() before start()."
            )
        weight, bias = self.fitted["weight"], self.fitted.get("bias")
        self.head = nn.Linear(*reversed(weight.shape), bias=bias is not None).to(weight)
        self.head.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))

    def trained_slowly(self) -> list[nn.Parameter]:
        return self.trained()

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        logits = self.head(full_precision(outputs["embedding"]))
        expected = self.fitted["relationship"][labels_of(outputs)]
        return {"source_classes": self.alpha * nn.functional.cross_entropy(logits, expected)} | self.head_penalty(
            target
        )

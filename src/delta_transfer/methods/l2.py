"""The baselines without a penalty of their own."""

from .base import Regularizer


class L2(Regularizer):
    """Plain fine-tuning: cross-entropy, SGD weight decay on all parameters, BatchNorm and head included.

    Published value 1e-4 (official DELTA code). Weight decay w adds w/2 * ||theta||^2 to the loss.
    """

    def __init__(self, weight_decay: float = 1e-4):
        super().__init__(weight_decay=weight_decay)


class L2FE(L2):
    """Feature extraction: the backbone is frozen, parameters and BatchNorm statistics; only the head is trained."""

    freezes_backbone = True


class Scratch(L2):
    """No transfer: the same as L2 from random weights (backbone.weights=none)."""

    any_source = True  # and uses none: it stands beside methods that learn from one

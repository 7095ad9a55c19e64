"""The baselines without a penalty of their own."""

from .base import METHODS, Needs, WithoutPenalty


@METHODS.register("l2", "L2")
class L2(WithoutPenalty):
    """Plain fine-tuning: cross-entropy, and weight decay on all parameters, BatchNorm and head included.

    The published value is 1e-4 (official DELTA code). Weight decay w adds w/2 * ||theta||^2 to the loss.
    """


@METHODS.register("l2_fe", "L2-FE")
class L2FE(L2):
    """Feature extraction: the backbone's parameters and BatchNorm statistics are frozen; only the head is trained."""

    needs = Needs(frozen_backbone=True)


@METHODS.register("scratch", "Scratch")
class Scratch(L2):
    """No transfer: L2 from random weights (backbone.weights=none)."""

    # It uses no source, but a table may show it beside methods that learn from another architecture.
    needs = Needs(random_start=True, other_sources=True)

"""Running averages of the target's weights, which are evaluated and kept, such as EMA (Polyak, Juditsky, 1992)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.options import option
from ...models import Network
from ..callbacks import AVERAGES, Average, AverageConfig, Position


class RunningAverage(Average):
    """average <- (1 - w_t) average + w_t theta after each step t; the first average is theta.

    It covers all floating-point values of the state dict, including BatchNorm's moving statistics. Each stage of a
    method has an average of its own, and the next stage starts from it.
    """

    state = ("average", "steps")

    def __init__(self, config: AverageConfig):
        super().__init__(config)
        self.average: dict[str, Tensor] = {}
        self.steps = 0

    def weight(self, step: int) -> float:
        """w_t of step t = 2, 3, ..."""
        raise NotImplementedError

    @torch.no_grad()
    def on_update(self, at: Position) -> None:
        values = floating_point(at.state.target)
        self.steps += 1
        if self.average.keys() != values.keys():
            self.average = {name: value.clone() for name, value in values.items()}
            return
        self.average = {name: value.to(values[name].device) for name, value in self.average.items()}  # of a checkpoint
        torch._foreach_lerp_(list(self.average.values()), list(values.values()), self.weight(self.steps))

    def applied(self, target: Network) -> AbstractContextManager[None]:
        return lent(target, self.average)


@dataclass
class EMAConfig(AverageConfig):
    name: str = option("ema", "name of the average of the target's weights")
    decay: float = option(0.999, "factor on the average in every step", at_least=0, below=1)


@AVERAGES.register("ema", "EMA", EMAConfig)
class EMA(RunningAverage):
    """EMA: average <- d average + (1 - d) theta after every step t, with d = min(decay, (1 + t) / (10 + t)).

    The smaller d of the first steps lets the average leave its initial value. Source of that rule: TensorFlow's
    ExponentialMovingAverage with `num_updates`.
    """

    config: EMAConfig

    def weight(self, step: int) -> float:
        return 1 - min(self.config.decay, (1 + step) / (10 + step))


@contextmanager
def lent(target: Network, values: dict[str, Tensor]) -> Iterator[None]:
    """In this context `target` has these values of its state dict in the place of its own."""
    weights = target.weights()
    own = {name: weights[name].clone() for name in values}
    copy_values(weights, values)
    try:
        yield
    finally:
        copy_values(weights, own)


@torch.no_grad()
def copy_values(to: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        to[name].copy_(value)


def floating_point(target: Network) -> dict[str, Tensor]:
    """The floating-point values of the target's state dict, which share its memory."""
    return {name: value for name, value in target.weights().items() if value.is_floating_point()}

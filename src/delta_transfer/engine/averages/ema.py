"""EMA: an exponential moving average of the target's weights is evaluated and kept (Polyak, Juditsky, 1992)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...common.options import option
from ...models import Network
from ..callbacks import AVERAGES, Average, AverageConfig, Position


@dataclass
class EMAConfig(AverageConfig):
    name: str = option("ema", "name of the average of the target's weights")
    decay: float = option(0.999, "factor on the average in every step", at_least=0, below=1)


@AVERAGES.register("ema", "EMA", EMAConfig)
class EMA(Average):
    """average <- d * average + (1 - d) * theta after every step, with d = min(decay, (1 + t) / (10 + t)) in step t.

    The average covers all floating-point values of the state dict, so BatchNorm's moving statistics too. The smaller d
    of the first steps lets the average leave its initial value. Source of that rule: TensorFlow's
    ExponentialMovingAverage with `num_updates`. Each stage of a method has an average of its own, and the next stage
    starts from it.
    """

    config: EMAConfig

    def __init__(self, config: EMAConfig):
        super().__init__(config)
        self.average: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def on_update(self, at: Position) -> None:
        values = floating_point(at.state.target)
        self.steps += 1
        if self.average.keys() != values.keys():
            self.average = {name: value.clone() for name, value in values.items()}
            return
        self.average = {name: value.to(values[name].device) for name, value in self.average.items()}  # of a checkpoint
        decay = min(self.config.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.values()), list(values.values()), 1 - decay)

    @contextmanager
    def applied(self, target: Network) -> Iterator[None]:
        values = floating_point(target)
        kept = {name: value.clone() for name, value in values.items()}
        for name, average in self.average.items():
            values[name].copy_(average)
        try:
            yield
        finally:
            for name, value in kept.items():
                values[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.steps = dict(state["average"]), state["steps"]


def floating_point(target: Network) -> dict[str, Tensor]:
    """The floating-point values of the target's state dict, which share its memory."""
    return {name: value for name, value in target.weights().items() if value.is_floating_point()}

"""WiSE-FT: evaluates and keeps weights between the source's and the trained ones (Wortsman et al., CVPR 2022)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ...common.options import option
from ...models import Network, call
from ..callbacks import AVERAGES, Average, AverageConfig, Position
from ..tasks import Line
from .ema import copy_values, floating_point, lent

GRID = [number / 10 for number in range(11)]  # the authors'


@dataclass
class WiseConfig(AverageConfig):
    trained_backbone: ClassVar[bool] = True

    name: str = option("wise", "name of the average of the target's weights")
    a: float | None = option(
        0.5, "weight of the trained backbone; null: chosen on validation images", at_least=0, at_most=1
    )
    images: int = option(2048, "training images on which BatchNorm's statistics are estimated anew", above=0)

    @property
    def on_validation(self) -> bool:
        return self.a is None


@AVERAGES.register("wise", "WiSE-FT", WiseConfig)
class Wise(Average):
    """WiSE-FT: theta_a = (1 - a) theta_0 + a theta_1 for the backbone; the new head is theta_1's.

    theta_0 are the weights before the first step, theta_1 those after the last one. a is given, 0.5 by default, or
    chosen: the one of 0, 0.1, ..., 1 with the highest accuracy on the validation images, and the largest of equal ones.
    Training is not changed. Source: the paper and mlfoundations/wise-ft at 4639a39 (src/wise_ft.py), which interpolates
    the head too, since it begins as a zero-shot classifier, and whose networks have no BatchNorm. Here the statistics
    of a network between both ends are estimated anew from training crops, if training has moved them (derived). Each
    stage of a method has its own theta_0 and theta_1, and the next stage starts from theta_a.

    Accuracies on the images that a was chosen on are too high.
    """

    config: WiseConfig

    def __init__(self, config: WiseConfig):
        super().__init__(config)
        self.start: dict[str, Tensor] = {}
        self.mixed: dict[str, Tensor] | None = None  # theta_a of the last step
        self.validated: dict[float, float] = {}  # accuracy by a
        self.a = config.a

    def begin(self, target: Network, images: Callable[[], Iterable[Any]], validate: Callable[[], float]) -> None:
        values = floating_point(target)
        self.start = {name: value.clone() for name, value in values.items() if not target.is_head(name)}
        self.images, self.validate = images, validate

    def on_update(self, at: Position) -> None:
        self.mixed = None

    @contextmanager
    def applied(self, target: Network) -> Iterator[None]:
        values = floating_point(target)
        own = {name: value.clone() for name, value in values.items()}
        with lent(target, own):  # it has its own again afterwards
            if self.mixed is None:
                if self.config.a is None:
                    for a in GRID:
                        self._mix(target, own, a)
                        self.validated[a] = self.validate()
                    self.a = max(GRID, key=lambda a: (self.validated[a], a))
                self._mix(target, own, self.a)
                self.mixed = {name: value.clone() for name, value in values.items()}
            copy_values(values, self.mixed)
            yield

    @torch.no_grad()
    def _mix(self, target: Network, own: dict[str, Tensor], a: float | None) -> None:
        assert a is not None
        values = floating_point(target)
        copy_values(values, own)
        names = list(self.start)
        trained = [values[name] for name in names]
        torch._foreach_lerp_(trained, [self.start[name] for name in names], 1 - a)
        moved = any(
            not torch.equal(self.start[n], own[n]) for n in names if n.endswith(("running_mean", "running_var"))
        )
        if moved and 0 < a < 1:
            self._estimate_statistics(target)

    def _estimate_statistics(self, target: Network) -> None:
        """Sets BatchNorm's statistics to their mean over whole batches, as many as hold the wanted images."""
        layers = [module for module in target.traced.modules() if isinstance(module, _BatchNorm)]
        before = [(layer.momentum, layer.num_batches_tracked, deepcopy(layer.num_batches_tracked)) for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a mean in which all batches weigh the same
        training, seen = target.training, 0
        target.train()
        for images, labels in self.images():
            call(target, images)
            seen += len(labels)
            if seen >= self.config.images:
                break
        target.train(training)
        for layer, (momentum, counter, count) in zip(layers, before, strict=True):
            layer.momentum = momentum
            if counter is not None and count is not None:
                counter.copy_(count)

    def report(self) -> Line:
        chosen: Line = {"a": self.a}
        return {"average": chosen | ({"val_top1": [self.validated[a] for a in GRID]} if self.validated else {})}

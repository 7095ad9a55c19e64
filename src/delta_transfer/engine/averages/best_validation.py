"""Early stopping: keeps the weights of the best evaluation on the validation split, as the graph papers do."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...common.errors import UserError
from ...common.options import option
from ...models import Network
from ...records.metrics import METRICS
from ..callbacks import AVERAGES, Average, AverageConfig, Position
from ..tasks import Line
from .ema import lent


@dataclass
class BestValidationConfig(AverageConfig):
    chooses: ClassVar[bool] = True

    name: str = option("best_validation", "name of the average of the target's weights")
    measure: str = option(
        "roc_auc", "measure on the validation split", choices=[key[4:] for key in METRICS if key.startswith("val_")]
    )
    patience: int = option(20, "evaluations after the best one before training ends", at_least=1)

    @property
    def on_validation(self) -> bool:
        return True


@AVERAGES.register("best_validation", "best on validation", BestValidationConfig)
class BestValidation(Average):
    """Early stopping: theta of the step with the best validation measure, the first one among equals.

    Training ends `patience` evaluations after the best one. `eval_epochs` of the schedule says when they come. The
    record of such a run says "best validation" in the place of "last iteration". Each stage of a method has a best
    step of its own, and the next stage starts there.
    """

    selection: ClassVar[str] = "best validation"
    state = ("best", "best_step", "waited", "weights")
    config: BestValidationConfig

    def __init__(self, config: BestValidationConfig):
        super().__init__(config)
        self.best: float | None = None
        self.best_step, self.waited = 0, 0
        self.weights: dict[str, Tensor] = {}
        self.better = self.ended = False

    def on_line(self, line: Line) -> None:
        key = f"val_{self.config.measure}"
        if key not in line:
            if any(name.startswith(("val_", "test_")) for name in line):
                there = ", ".join(name[4:] for name in METRICS if name in line)
                raise UserError(f"average.measure={self.config.measure}: this task has {there} on validation.")
            return
        merit = METRICS[key].merit
        self.better = self.best is None or merit(line[key]) > merit(self.best)
        if self.better:
            self.best, self.best_step, self.waited = line[key], line["step"], 0
        else:
            self.waited += 1

    def on_step(self, at: Position) -> None:
        if self.better:
            self.weights = {name: value.clone() for name, value in at.state.target.weights().items()}
            self.better = False
        if self.waited >= self.config.patience:
            at.end = at.done

    def finish(self, measure: Callable[[], Line]) -> None:
        self.ended = True
        measure()

    def applied(self, target: Network) -> AbstractContextManager[None]:
        """In this context `target` has the best weights if training has ended, else its own."""
        return lent(target, self.weights if self.ended else {})

    def report(self) -> Line:
        return {"best_step": self.best_step}

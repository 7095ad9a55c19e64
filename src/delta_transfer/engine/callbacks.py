"""What watches a training: lines of metrics, the display, live views, checkpoints and the wish to stop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..common import interrupts
from ..common.options import require
from ..methods.base import TrainState
from ..records.run_directory import RunDirectory
from . import devices

GRADIENT_NORM = "gradient_norm"  # the norm of the whole gradient, beside the loss terms in a line of metrics
CHECKPOINT_SHARE = 0.01  # the largest part of the time that checkpoints may take
Line = dict[str, Any]  # a line of metrics
Check = Callable[[str, float, int, int, float], None]  # of name, value, iteration, steps taken before it, learning rate


# --- Where a training is ---


@dataclass
class Progress:
    """Where a training begins, or where it goes on after a checkpoint."""

    first_iteration: int  # the number of the first batch: stages count on from one another
    iterations_done: int
    seconds: float = 0.0  # of training, of all stages
    seconds_since_line: float = 0.0
    window: dict[str, Any] = field(default_factory=dict)  # what the next line of metrics has collected

    @classmethod
    def beginning(cls, iteration: int = 0, seconds: float = 0.0) -> "Progress":
        """A training that begins with `iteration`, when the stages before it took `seconds`."""
        return cls(iteration, iteration, seconds)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


class MetricsWindow:
    """Loss terms and accuracy since the last line of metrics. They stay on the device until they are needed."""

    def __init__(self, first_iteration: int):
        self.first_iteration = first_iteration
        self.losses: list[str] = []  # names of the loss terms
        self.extra: list[str] = []  # names of the other values
        self.rows: list[Tensor] = []  # the values of each step
        self.correct: list[Tensor] = []
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor, losses: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        values = losses | extra
        self.losses, self.extra = list(losses), list(extra)
        self.rows.append(torch.stack([value.float() for value in values.values()]))
        self.correct.append((logits.argmax(dim=1) == labels).sum())
        self.images += len(labels) * devices.processes()

    def close(self, lr: float, check: Check) -> Line:
        """The means of all values, the whole loss, the training accuracy in percent. `check` looks at each value."""
        rows = devices.average(torch.stack(self.rows)).tolist()
        names = self.losses + self.extra
        for iteration, row in enumerate(rows, self.first_iteration):
            for name, value in zip(names, row, strict=True):
                check(name, value, iteration, iteration, lr)
        means = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        losses = {name: means[name] for name in self.losses}
        correct = devices.average(torch.stack(self.correct).sum().double()).item() * devices.processes()
        extra = {name: means[name] for name in self.extra}
        return losses | {"loss": sum(losses.values())} | extra | {"train_top1": 100 * correct / self.images}

    def state_dict(self) -> dict[str, Any]:
        """On the CPU, which waits for the device."""
        tensors = {name: torch.stack(getattr(self, name)).cpu() for name in ("rows", "correct") if self.images}
        kept = ("first_iteration", "losses", "extra", "images")
        return {name: getattr(self, name) for name in kept} | tensors

    @classmethod
    def resumed(cls, progress: Progress, device: torch.device) -> "MetricsWindow":
        window = cls(progress.iterations_done)
        for name, value in progress.window.items():
            setattr(window, name, list(value.to(device)) if isinstance(value, Tensor) else value)
        return window


class Clock:
    """Seconds of training, in all and since the last lap. It stands still between `pause` and `restart`."""

    def __init__(self, seconds: float = 0.0, since_lap: float = 0.0):
        self.seconds, self.since_lap = seconds, since_lap
        self.restart()

    @classmethod
    def resumed(cls, progress: Progress) -> "Clock":
        return cls(progress.seconds, progress.seconds_since_line)

    def restart(self) -> None:
        self.started = time.perf_counter()

    def pause(self) -> None:
        elapsed = time.perf_counter() - self.started
        self.seconds += elapsed
        self.since_lap += elapsed

    def lap(self, images: int) -> float:
        """Images per second since the last lap."""
        self.pause()
        seconds, self.since_lap = self.since_lap, 0.0
        return images / seconds


@dataclass
class Position:
    """The training as its callbacks see it after a step."""

    state: TrainState
    begun: Progress
    end: int  # the iteration after the last one
    window: MetricsWindow
    clock: Clock
    done: int = 0

    def progress(self) -> Progress:
        """Where a training from here goes on. It waits for the device."""
        window = self.window.state_dict()
        self.clock.pause()
        return Progress(self.begun.first_iteration, self.done, self.clock.seconds, self.clock.since_lap, window)


# --- Callbacks ---


class Callback:
    """Is told of every line of metrics and of every step."""

    def on_line(self, line: Line) -> None:
        pass

    def on_step(self, at: Position) -> None:
        pass


class OnLine(Callback):
    """Calls a function with every line of metrics."""

    def __init__(self, function: Callable[[Line], None]):
        self.function = function

    def on_line(self, line: Line) -> None:
        self.function(line)


class Checkpoints(Callback):
    """Saves a checkpoint now and then, and when this process was asked to end; then it raises interrupts.Stopped.

    Checkpoints are `seconds` apart, or further, so that they take less than CHECKPOINT_SHARE of the time.
    """

    def __init__(self, seconds: float, save: Callable[[Progress], None]):
        self.seconds, self.save = seconds, save
        self.last, self.cost = time.monotonic(), 0.0

    def on_step(self, at: Position) -> None:
        stop = interrupts.received() is not None
        due = time.monotonic() - self.last > max(self.seconds, self.cost / CHECKPOINT_SHARE)
        # The process that writes does not know what the others have seen since the last line.
        complete = devices.processes() == 1 or not at.window.images
        if not (stop or due) or at.done == at.end or not complete:
            return
        begun = time.monotonic()
        self.save(at.progress())
        if stop:
            raise interrupts.Stopped
        at.clock.restart()
        self.last = time.monotonic()
        self.cost = self.last - begun


def require_live_view(logging: str) -> None:
    """Raises UserError if the package that `logging` names is not installed."""
    require(
        logging == "none" or find_spec("tensorboard") is not None,
        "logging=tensorboard needs the package tensorboard: pip install 'delta-transfer[tensorboard]'",
    )


@contextmanager
def live_view(logging: str, directory: RunDirectory, first_iteration: int) -> Iterator[Callable[[Line], None]]:
    """A function that shows a line of metrics in TensorBoard, whose files lie in the run's directory.

    metrics.jsonl stays the record. A resumed run replaces what was shown of the iterations that it repeats.
    """
    if logging == "none" or not directory.writes:
        yield lambda line: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(directory.path, purge_step=first_iteration + 1) as writer:

        def show(line: Line) -> None:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, line["step"])

        yield show

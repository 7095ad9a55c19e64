"""Callbacks of a training: lines of metrics, the display, live views, checkpoints and requests to stop."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..common.console import log
from ..common.errors import UserError
from ..common.options import Options, Registry, option
from ..methods.base import Regularizer, Stage, TrainState
from ..models import Network
from ..records.checked import save_with_checksum
from ..records.checkpoints import read_checkpoint, write_checkpoint
from ..records.run_directory import RunDirectory
from . import devices
from .devices import Stopped, stop_signal
from .tasks import Line, MetricsWindow

CHECKPOINT_SHARE = 0.01  # the largest part of the time that checkpoints may take


# --- Where a training is ---


@dataclass
class Progress:
    """Where a training begins, or where it goes on after a checkpoint."""

    first_iteration: int  # the number of the first batch: a stage goes on counting where the previous one ended
    iterations_done: int
    seconds: float = 0.0  # of training, of all stages
    processor_seconds: float = 0.0  # of the training thread within them
    seconds_since_line: float = 0.0
    window: dict[str, Any] = field(default_factory=dict)  # what the next line of metrics has collected
    unmeasured: bool = False  # the evaluation that belongs to that line was stopped

    @classmethod
    def beginning(cls, iteration: int = 0, seconds: float = 0.0, processor_seconds: float = 0.0) -> "Progress":
        """A training that begins with `iteration`, when the stages before it took `seconds`."""
        return cls(iteration, iteration, seconds, processor_seconds)


class Clock:
    """Seconds of training, in all and in this lap. It stands still between `pause` and `restart`.

    Processor seconds are those of the training thread, which does its share of all work. They do not count the time
    that it waits for a core beside other programs, and stay about what `seconds` are on an idle machine.
    """

    def __init__(self, begun: Progress):
        self.seconds, self.processor_seconds = begun.seconds, begun.processor_seconds
        self.since_lap = begun.seconds_since_line
        self.restart()

    def restart(self) -> None:
        self.started, self.processor_started = time.perf_counter(), time.thread_time()

    def pause(self) -> None:
        began, processor_began = self.started, self.processor_started
        self.restart()
        self.seconds += self.started - began
        self.since_lap += self.started - began
        self.processor_seconds += self.processor_started - processor_began

    def rate(self, images: int) -> float:
        """Images per second in this lap."""
        self.pause()
        return images / self.since_lap

    def next_lap(self) -> None:
        self.since_lap = 0.0
        self.restart()


@dataclass
class Position:
    """The training as its callbacks see it after a step."""

    state: TrainState
    begun: Progress
    end: int  # the iteration after the last one; a callback may bring it forward
    window: MetricsWindow
    clock: Clock
    done: int = 0

    def progress(self, unmeasured: bool = False) -> Progress:
        """Where a training that resumes here begins. It waits for the device."""
        window = self.window.state_dict()
        self.clock.pause()
        clock = self.clock
        times = clock.seconds, clock.processor_seconds, clock.since_lap
        return Progress(self.begun.first_iteration, self.done, *times, window, unmeasured)


# --- Callbacks ---


class Callback:
    """Is told of every update of the target, of every line of metrics, and then of the end of every step."""

    def on_update(self, at: Position) -> None:
        """Called after the optimizer's step, before anything is measured."""

    def on_line(self, line: Line) -> None:
        """Called with a line of metrics, which has the measurements of an evaluation if there was one."""

    def on_evaluation(self, at: Position) -> None:
        """Called before an evaluation, in which the clock stands still."""

    def on_step(self, at: Position) -> None:
        """Called when the step and its line are done: training can go on from here."""

    def on_stop(self, at: Position) -> None:
        """Called when the process is asked to end within an evaluation."""


@contextmanager
def stopped_within(at: Position, callbacks: Sequence[Callback]) -> Iterator[None]:
    """In this context the clock stands still, and an evaluation may end in Stopped, of which callbacks are told."""
    for callback in callbacks:
        callback.on_evaluation(at)
    try:
        yield
    except Stopped:
        at.clock.restart()
        for callback in callbacks:
            callback.on_stop(at)
        raise


@dataclass
class AverageConfig(Options):
    """Options of every average of the target's weights."""

    key: ClassVar[str] = "average"
    chooses: ClassVar[bool] = False  # whether it chooses among evaluations, whose interval then changes the result
    trained_backbone: ClassVar[bool] = False  # it would do nothing where the backbone is frozen

    name: str = option("none", "name of the average of the target's weights; none: the last weights count")

    @property
    def on_validation(self) -> bool:
        """Whether something is chosen on validation images."""
        return False


class Average(Callback):
    """No average: the weights of the last step are evaluated and kept. engine/averages/ has others."""

    selection: ClassVar[str] = "last iteration"  # whose weights count, for the record
    state: ClassVar[tuple[str, ...]] = ()  # attributes that a checkpoint keeps

    def __init__(self, config: AverageConfig):
        self.config = config

    def begin(self, target: Network, images: Callable[[], Iterable[Any]], validate: Callable[[], float]) -> None:
        """Called with the target before the first step of its stage, and before a checkpoint's weights are loaded.

        images: makes one pass of training batches, for statistics, always the same. validate: the accuracy of the
        target as it is on validation images, in percent.
        """

    def finish(self, measure: Callable[[], Line]) -> None:
        """Called when training has ended. `measure` measures anew, if the last weights are not those that count."""

    def applied(self, target: Network) -> AbstractContextManager[None]:
        """In this context `target` has the averaged weights."""
        return nullcontext()

    def report(self) -> Line:
        """Its choice, for the run's record, after it was applied."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: getattr(self, name) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


AVERAGES: Registry[type[Average]] = Registry("average.name")
AVERAGES.register("none", "last weights", AverageConfig)(Average)


class OnLine(Callback):
    """Calls a function with every line of metrics."""

    def __init__(self, function: Callable[[Line], object]):
        self.function = function

    def on_line(self, line: Line) -> None:
        self.function(line)


class Checkpoints(Callback):
    """Saves a checkpoint from time to time, and when this process is asked to end; then it raises Stopped.

    They are `seconds` apart (the last one a sixth), or so far that they take less than CHECKPOINT_SHARE of the time.
    """

    def __init__(self, seconds: float, save: Callable[[Progress], None]):
        self.seconds, self.save = seconds, save
        self.last, self.cost = time.monotonic(), 0.0

    def on_evaluation(self, at: Position) -> None:
        if at.done == at.end and self._due(self.seconds / 6):  # nothing else is saved until the run has ended
            self.on_stop(at)

    def on_stop(self, at: Position) -> None:
        self.save(at.progress(unmeasured=True))

    def _due(self, seconds: float) -> bool:
        return time.monotonic() - self.last > max(seconds, self.cost / CHECKPOINT_SHARE)

    def on_step(self, at: Position) -> None:
        stop, due = stop_signal() is not None, self._due(self.seconds)
        # The process that writes does not know what the others have seen since the last line.
        complete = devices.processes() == 1 or not at.window.images
        if not (stop or due) or at.done == at.end or not complete:
            return
        begun = time.monotonic()
        self.save(at.progress())
        if stop:
            raise Stopped
        at.clock.restart()
        self.last = time.monotonic()
        self.cost = self.last - begun


# --- Stages ---

CONTENT: dict[str, Any] = {  # types of the entries of a checkpoint
    **dict.fromkeys(("target", "optimizer", "method", "average", "modules", "progress"), dict),
    **{"stage": int, "ended": list, "previous": dict | None, "metrics": str},
}


class StageRunner:
    """Iterates over the stages that a run has yet to train, and passes the state of each on to the next.

    Args:
        length: iterations of a stage.
        new_target: makes the untrained target, into which a checkpoint's weights are loaded.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        length: int,
        directory: RunDirectory,
        device: torch.device,
        new_target: Callable[[], Network],
    ):
        self.stages, self.length, self.directory, self.device = stages, length, directory, device
        self.new_target = new_target
        self.index = 0
        self.previous: Network | None = None  # the frozen target of the previous stage
        self.state: TrainState | None = None
        self.average: Average = Average(AverageConfig())
        self.ended: list[Line] = []  # results of the previous stages
        self.modules: dict[str, Tensor] = {}  # parameters of their methods, by stage
        self.seconds = self.processor_seconds = 0.0  # of training, of all stages
        self.iterations_done = 0
        self._checkpoint: dict[str, Any] | None = None

    @property
    def method(self) -> Regularizer:
        return self.stages[self.index].method

    @property
    def iterations(self) -> int:
        """Iterations of all stages."""
        return len(self.stages) * self.length

    def __iter__(self) -> Iterator[Stage]:
        self._read_checkpoint()
        while True:
            self.state = None  # frees the memory of the previous stage
            yield self.stages[self.index]
            if self.index + 1 == len(self.stages):
                return
            target = self.trained()
            self.index += 1
            with self.average.applied(target):  # the next stage starts where this one was measured
                self.previous = target.copy().freeze()
            del target
            if self.stages[self.index].alignment_target == "previous" and self.modules:
                # The next modules are a function of this network's maps.
                name = f"stage{self.index}.safetensors"
                self.directory.write(name, save_with_checksum(self.previous.cpu_weights()))

    def trained(self) -> Network:
        """The target of this stage."""
        assert self.state is not None, "no stage has begun"
        return self.state.target

    def begin(self, state: TrainState, average: Average) -> Progress:
        """Where the training of this stage begins: at the last checkpoint, or at its first iteration."""
        self.state, self.average = state, average
        if self._checkpoint is not None:
            checkpoint, self._checkpoint = self._checkpoint, None
            return self._resume(state, checkpoint)
        progress = Progress.beginning(self.index * self.length, self.seconds, self.processor_seconds)
        if self.index:  # from here on the result of the previous stage is safe
            self.save(progress)
            if stop_signal() is not None:
                raise Stopped
        return progress

    def end(self, at: Position, measured: Line) -> None:
        """Keeps the result of the stage, and what its method learned."""
        self.seconds, self.processor_seconds = at.clock.seconds, at.clock.processor_seconds
        self.iterations_done = at.done
        self.ended = [*self.ended, self._planned(self.stages[self.index]) | measured]
        for name, parameter in self.method.named_parameters():
            if parameter.requires_grad:
                self.modules[f"stage{self.index + 1}.{name}"] = parameter.detach().cpu().clone()

    def speed(self, batch_size: int) -> Line:
        """The time of all stages, for the record. On a GPU the training thread's processor time means nothing."""
        on_cpu = {"train_processor_seconds": self.processor_seconds} if self.device.type == "cpu" else {}
        rate = self.iterations_done * batch_size / self.seconds
        return {"iterations": self.iterations_done, "train_seconds": self.seconds, "images_per_second": rate} | on_cpu

    def record(self) -> Line:
        """The stages for the run's record, if there are several. One that did not end has no measurements."""
        stages = self.ended + [self._planned(stage) for stage in self.stages[len(self.ended) :]]
        return {"stages": stages} if len(stages) > 1 else {}

    def _planned(self, stage: Stage) -> Line:
        return {"method": type(stage.method).__name__, "iterations": self.length}

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint, with which a run can resume at `progress`."""
        if not self.directory.writes or self.state is None:
            return
        content: dict[str, Any] = {
            "target": self.state.target.state_dict(),
            "optimizer": self.state.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "average": self.average.state_dict(),
            "stage": self.index,
            "ended": self.ended,
            "modules": self.modules,
            "previous": self.previous.traced.state_dict() if self.previous else None,
            "progress": asdict(progress),
            "metrics": self.directory.metrics(),
        }
        with self.directory.open(self.directory.checkpoint_path.name) as file:
            write_checkpoint(file, content, devices.made_with(self.device))

    def _read_checkpoint(self) -> None:
        with devices.rank0_first():  # it removes a checkpoint that cannot be used
            checkpoint = read_checkpoint(self.directory.checkpoint_path, devices.made_with(self.device), self._fits)
        if checkpoint is None:
            self.directory.restore_metrics("")
            return
        self._checkpoint = checkpoint
        self.index, self.ended, self.modules = (checkpoint[key] for key in ("stage", "ended", "modules"))
        if checkpoint["previous"] is not None:
            self.previous = self.new_target()
            with self._of_this_run():
                self.previous.traced.load_state_dict(checkpoint["previous"])
            self.previous.freeze()

    def _fits(self, checkpoint: dict[str, Any]) -> bool:
        """Whether a checkpoint holds all that `save` writes."""
        whole = all(name in checkpoint and isinstance(checkpoint[name], kind) for name, kind in CONTENT.items())
        return (
            whole
            and checkpoint["stage"] in range(len(self.stages))
            and checkpoint["progress"].keys() == asdict(Progress.beginning()).keys()
        )

    @contextmanager
    def _of_this_run(self) -> Iterator[None]:
        """In this context a failure to load means that the checkpoint is of another run: it is removed."""
        try:
            yield
        except (RuntimeError, ValueError, KeyError) as error:
            path = self.directory.checkpoint_path
            raise UserError(f"{path} is of another method, network or version. It is removed.") from error

    def _resume(self, state: TrainState, checkpoint: dict[str, Any]) -> Progress:
        with self._of_this_run():
            state.target.load_state_dict(checkpoint["target"])
            state.optimizer.load_state_dict(checkpoint["optimizer"])
            self.method.load_state_dict(checkpoint["method"])
            self.average.load_state_dict(checkpoint["average"])
        self.directory.restore_metrics(checkpoint["metrics"])
        progress = Progress(**checkpoint["progress"])
        log.info(f"{self.directory.path.name}: resuming after iteration {progress.iterations_done}")
        return progress

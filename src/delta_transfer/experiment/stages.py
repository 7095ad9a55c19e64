"""The stages of a method, one after the other, from the last checkpoint on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import interrupts
from ..common.console import log
from ..common.errors import UserError
from ..engine import devices
from ..engine.assemble import cpu_weights
from ..engine.callbacks import Line, Progress
from ..engine.loop import TrainState
from ..methods.base import Regularizer, Stage
from ..models import Network
from ..records.checked import save_with_checksum
from ..records.checkpoints import read_checkpoint, write_checkpoint
from ..records.run_directory import RunDirectory


class StageRunner:
    """Iterates over the stages that a run has still to train, and keeps what they leave to one another.

    Args:
        length: iterations of a stage.
        new_target: makes the untrained target, which a checkpoint's weights go into.
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
        self.index = 0
        self.previous: Network | None = None  # the frozen target that the stage before left
        self.state: TrainState | None = None
        self.ended: list[Line] = []  # what the stages before came to
        self.modules: dict[str, Tensor] = {}  # what their methods learned, by stage
        self.seconds = 0.0  # of training, of all stages
        with devices.rank0_first():  # which removes a checkpoint that cannot be used
            self._checkpoint = read_checkpoint(directory.checkpoint_path, devices.made_with(device))
        if self._checkpoint is None:
            directory.restore_metrics("")
            return
        self.index, self.ended, self.modules = (self._checkpoint[key] for key in ("stage", "ended", "modules"))
        if self._checkpoint["previous"] is not None:
            self.previous = new_target()
            self.previous.traced.load_state_dict(self._checkpoint["previous"])
            self.previous.freeze()

    @property
    def method(self) -> Regularizer:
        return self.stages[self.index].method

    @property
    def iterations(self) -> int:
        """Iterations of all stages."""
        return len(self.stages) * self.length

    def __iter__(self) -> Iterator[Stage]:
        while True:
            self.state = None  # the stage before makes room for the next
            yield self.stages[self.index]
            if self.index + 1 == len(self.stages):
                return
            assert self.state is not None
            self.index += 1
            self.previous = self.state.target.copy().freeze()
            if self.stages[self.index].alignment_target == "previous" and self.modules:
                # The next modules are a function of this network's maps.
                name = f"stage{self.index}.safetensors"
                self.directory.write(name, save_with_checksum(cpu_weights(self.previous)))

    def begin(self, state: TrainState) -> Progress:
        """Where the training of this stage begins: at the last checkpoint, or at its first iteration."""
        self.state = state
        if self._checkpoint is not None:
            checkpoint, self._checkpoint = self._checkpoint, None
            return self._resume(state, checkpoint)
        progress = Progress.beginning(self.index * self.length, self.seconds)
        if self.index:  # the result of the stage before is safe from here on
            self.save(progress)
            if interrupts.received() is not None:
                raise interrupts.Stopped
        return progress

    def end(self, seconds: float, measured: Line) -> None:
        """Notes what the stage came to, and what its method learned."""
        self.seconds = seconds
        self.ended = [*self.ended, self._planned(self.stages[self.index]) | measured]
        for name, parameter in self.method.named_parameters():
            if parameter.requires_grad:
                self.modules[f"stage{self.index + 1}.{name}"] = parameter.detach().cpu().clone()

    def record(self) -> Line:
        """The stages for the run's record, if there are several. One that did not end has no measurements."""
        stages = self.ended + [self._planned(stage) for stage in self.stages[len(self.ended) :]]
        return {"stages": stages} if len(stages) > 1 else {}

    def _planned(self, stage: Stage) -> Line:
        return {"method": type(stage.method).__name__, "iterations": self.length}

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint, from which `progress` goes on."""
        if not self.directory.writes or self.state is None:
            return
        content: dict[str, Any] = {
            "target": self.state.target.state_dict(),
            "optimizer": self.state.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "stage": self.index,
            "ended": self.ended,
            "modules": self.modules,
            "previous": self.previous.traced.state_dict() if self.previous else None,
            "progress": progress.state_dict(),
            "metrics": self.directory.metrics(),
        }
        with self.directory.open(self.directory.checkpoint_path.name) as file:
            write_checkpoint(file, content, devices.made_with(self.device))

    def _resume(self, state: TrainState, checkpoint: dict[str, Any]) -> Progress:
        try:
            state.target.load_state_dict(checkpoint["target"])
            state.optimizer.load_state_dict(checkpoint["optimizer"])
            self.method.load_state_dict(checkpoint["method"])
        except (RuntimeError, ValueError, KeyError) as error:
            path = self.directory.checkpoint_path
            raise UserError(f"{path} holds another method or network, of another version. It is removed.") from error
        self.directory.restore_metrics(checkpoint["metrics"])
        progress = Progress(**checkpoint["progress"])
        log.info(f"{self.directory.path.name}: resuming after iteration {progress.iterations_done}")
        return progress

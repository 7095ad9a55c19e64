"""delta-run in child processes, with something that goes wrong in them.

They are forked from a process that has tests/forked.py: each starts in a tenth of a second.
"""

import ctypes
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import scipy.stats
import torch
import torchvision.models.feature_extraction
import torchvision.transforms.v2

import delta_transfer
from delta_transfer import train
from delta_transfer.engine import callbacks, loop
from delta_transfer.records.run_directory import RunDirectory

PACKAGE = str(Path(delta_transfer.__file__).parent)
# Imported only when they are needed; imported here, the children have them.
assert scipy.stats and torchvision.models.feature_extraction and torchvision.transforms.v2
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.forked"])

Fault = Callable[[], None]  # called in the child before the command


class Child:
    def __init__(self, arguments: list[str], faults: tuple[Fault, ...]):
        reader, writer = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_command, args=(writer, arguments, faults))
        self.process.start()
        writer.close()
        self._output = b""
        self._listener = Thread(target=self._listen, args=(reader,), daemon=True)
        self._listener.start()

    def _listen(self, reader: Connection) -> None:
        while data := os.read(reader.fileno(), 1 << 16):
            self._output += data

    def wait(self, seconds: float = 120) -> int:
        """The exit status; minus the signal's number if one killed it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.text()}"
        self._listener.join()
        return self.process.exitcode

    def text(self) -> str:
        """What it has written to stdout and stderr."""
        return self._output.decode()

    def wait_for(self, text: str) -> None:
        while text not in self.text():
            assert self.process.is_alive(), self.text()
            self.process.join(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)


def start(arguments: list[str], *faults: Fault) -> Child:
    """`delta-run <arguments>`."""
    return Child(arguments, faults)


def finish(arguments: list[str], *faults: Fault) -> tuple[int, str]:
    """Its exit status and output."""
    child = start(arguments, *faults)
    return child.wait(), child.text()


def _command(output: Connection, arguments: list[str], faults: tuple[Fault, ...]) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.argv = ["delta-run", *arguments]
    torch.set_num_threads(1)
    callbacks.CHECKPOINT_SHARE = 1e9  # as often as schedule.checkpoint_seconds says
    for fault in faults:
        fault()
    try:
        train.main()
    finally:
        sys.stdout.flush()
        for fault in faults:
            getattr(fault, "afterwards", lambda: None)()


# --- what can go wrong; objects, since they are sent to the child ---


@dataclass
class KillAtLine:
    """SIGKILL before the line number `number` of our code, in the order in which the main thread executes them."""

    number: int
    executed = 0

    def __call__(self) -> None:
        sys.settrace(lambda frame, *_: self._line if frame.f_code.co_filename.startswith(PACKAGE) else None)

    def _line(self, frame, event: str, argument):
        if event == "line":
            self.executed += 1
            if self.executed == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._line


@dataclass
class CountLines(KillAtLine):
    """How many lines of our code are executed, written to `file`."""

    number: int = -1
    file: Path = Path()

    def afterwards(self) -> None:
        sys.settrace(None)
        self.file.write_text(str(self.executed))


@dataclass
class FullDisk:
    """No file may grow beyond `size` bytes: what is written stops in its middle, as on a full disk. Needs no root."""

    size: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def without_privileges() -> None:
    """Permissions count for root, too: it gives up the capabilities that pass over them."""
    if os.geteuid() != 0:
        return
    overriding = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0
    sets[0] &= ~overriding
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def killed_after_the_summary() -> None:
    """SIGKILL when summary.json has its name."""
    whole = RunDirectory.write_summary

    def write(self: RunDirectory, summary: dict) -> None:
        whole(self, summary)
        os.kill(os.getpid(), signal.SIGKILL)

    RunDirectory.write_summary = write


def jumping_clock() -> None:
    """The time of day goes forth and back by a year whenever it is asked for."""
    wall, jumps = time.time, itertools.cycle([0, 3e7, -3e7])
    time.time = lambda: wall() + next(jumps)


@dataclass
class AtStep:
    """After optimizer step `step`, counted from 1 in this process, it gets a signal or waits for the file `until`."""

    step: int
    signal: int | None = None
    until: Path | None = None

    def __call__(self) -> None:
        taken, whole = itertools.count(1), loop.TrainState.optimizer_step

        def step(state: loop.TrainState) -> torch.Tensor:
            gradient_norm = whole(state)
            if next(taken) == self.step:
                while self.until is not None and not self.until.exists():
                    time.sleep(0.01)
                if self.signal is not None:
                    os.kill(os.getpid(), self.signal)
            return gradient_norm

        loop.TrainState.optimizer_step = step

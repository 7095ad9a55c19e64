"""Messages and progress: a progress bar on a terminal, plain lines in a pipe or a file."""

import logging
import re
import signal
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

log = logging.getLogger("delta_transfer")  # `show_messages` shows what it is told

# Keys of a metrics line that are no loss terms.
OTHER_KEYS = re.compile(
    "step|stage|lr|loss|gradient_norm|images_per_second|train_top1|(attention|val|test)_.*", re.DOTALL
)


def is_loss(name: str) -> bool:
    """Whether a key of a metrics line is a term of the loss."""
    return not OTHER_KEYS.fullmatch(name)


class Display:
    """The progress of one task of `total` steps. Use it as a context manager."""

    bars = True  # False in parallel jobs, whose bars would overwrite each other

    def __init__(self, title: str, total: int, unit: str = "iteration"):
        self.title, self.total, self.unit = title, total, unit
        self.console = Console(stderr=False)
        self.last_tenth, self.started, self.first_step = -1, time.monotonic(), 0
        self.progress: Progress | None = None

    def __enter__(self) -> "Display":
        if self.bars and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                # A narrow terminal cuts the text and never wraps it.
                TextColumn(
                    "{task.fields[text]}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=self.console,
                transient=True,
                expand=True,
            )
            self.progress.start()
            self.task = self.progress.add_task(self.title, total=self.total, text="")
        return self

    def __exit__(self, *_) -> None:
        if self.progress:
            self.progress.stop()

    def start_at(self, step: int) -> None:
        """A resumed task goes on at `step`; the time left is estimated from the steps after it."""
        self.first_step = step
        if self.progress:
            self.progress.update(self.task, completed=step)

    def update(self, step: int, text: str = "") -> None:
        if self.progress:
            self.progress.update(self.task, completed=step, text=text)
            return
        tenth = 10 * step // self.total
        if tenth == self.last_tenth:
            return
        if self.last_tenth < 0 and not self.first_step:
            self.first_step = step - 1  # it begins here, or an earlier attempt stopped here
        self.last_tenth = tenth
        parts = [f"{self.title}: {self.unit} {step}/{self.total}", text]
        if 0 < tenth < 10:  # the first step says nothing about the others
            elapsed = time.monotonic() - self.started
            parts.append(f"{elapsed / max(1, step - self.first_step) * (self.total - step):.0f} s left")
        log.info("  ".join(part for part in parts if part))

    def metrics(self, line: dict[str, Any]) -> None:
        """Shows one line of metrics."""
        losses = "  ".join(f"{name} {value:.3g}" for name, value in line.items() if is_loss(name))
        shown = {f"{part}_top1": part for part in ("train", "val", "test")} | {"test_pair_accuracy": "test pairs"}
        accuracy = "  ".join(f"{name} {line[key]:.1f} %" for key, name in shown.items() if key in line)
        self.update(line["step"], f"{losses}  {accuracy}  {line['images_per_second']:.0f} images/s")


class _Terminal(logging.Handler):
    """Shows messages as plain lines: information on standard output, errors on standard error.

    A message is written at once, so that lines of parallel runs stay apart. Lines are never wrapped.
    """

    def __init__(self, information_on_stderr: bool):
        super().__init__()
        self.information_on_stderr = information_on_stderr

    def emit(self, record: logging.LogRecord) -> None:
        error = record.levelno >= logging.ERROR
        message = printable(record.getMessage())
        console = Console(stderr=error or self.information_on_stderr, soft_wrap=True, highlight=False, emoji=False)
        console.print(f"error: {message}" if error else message, markup=False)


def show_messages(information_on_stderr: bool = False) -> None:
    """Shows the package's messages to a person; every command calls it. Without it they go where a host program sends
    them.
    """
    log.handlers = [_Terminal(information_on_stderr)]
    log.setLevel(logging.INFO)
    log.propagate = False
    log.disabled = False  # another package's logging configuration may have switched it off


def stoppable(main: Callable[..., int]) -> Callable[..., int]:
    """A decorator for commands: Ctrl-C ends them with one sentence and the exit status that shells expect."""

    @wraps(main)
    def stopped(*arguments) -> int:
        show_messages()
        try:
            return main(*arguments)
        except KeyboardInterrupt:
            log.error("stopped by SIGINT")
            return 128 + signal.SIGINT

    return stopped


def shorten_list(names: Sequence[str], count: int = 5) -> str:
    """The first names, and the number of the others."""
    more = f", ... ({len(names) - count} more)" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def spelled_out(text: str, keep: str = "") -> str:
    """`text` with escape sequences (\\x1b, \\u202e) for characters that steer a terminal or the writing direction.

    Bytes of file names that are not UTF-8, which no file or figure takes, become escape sequences too.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """A message of one or several lines that any terminal can show."""
    return spelled_out(text.expandtabs(4), keep="\n")

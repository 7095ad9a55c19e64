"""Messages and progress: a progress bar on a terminal, plain lines in a pipe or a file."""

import argparse
import logging
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, wraps
from importlib.metadata import version
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from .errors import UserError, in_words

log = logging.getLogger("delta_transfer")  # `show_messages` shows its messages
Warn = Callable[[str], None]  # called with a line about each thing that is left out
QUIET = 5.0  # seconds until a command that makes a report shows its progress


@cache
def log_once(message: str) -> None:
    """Logs what holds for all runs of this process, such as a sentence about their data set, for the first of them."""
    log.info(message)


@dataclass(frozen=True)
class Report:
    """The numbers of a progress line beside the progress itself."""

    numbers: str = ""  # accuracies and speed, which are never cut
    losses: tuple[str, ...] = ()


class Display:
    """The progress of one task of `total` steps. Use it as a context manager.

    Otherwise it has no bar, only lines: one for each tenth of the steps, and one `line_seconds` after the last.
    quiet_seconds: it has no line before this time.
    """

    bars = True  # False in parallel jobs, whose bars would overwrite each other
    run_of_sweep = ""  # run 3 of 18

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "iteration",
        quiet_seconds: float = 0.0,
        line_seconds: float = math.inf,
    ):
        self.title, self.total, self.unit = title, total, unit
        self.quiet_seconds, self.line_seconds = quiet_seconds, line_seconds
        self.console = Console(stderr=False)
        self.last_tenth, self.last_step = -1, -1
        self.started = self.last_line = self.stepped = time.monotonic()
        self.first_step: int | None = None
        self.progress: Progress | None = None

    def __enter__(self) -> "Display":
        if self.bars and self.console.is_terminal:
            # The time left follows from the steps of this period, in which there have to be some.
            self.progress = Progress(_Line(self), console=self.console, transient=True, speed_estimate_period=3600)
            self.progress.start()
            self.task = self.progress.add_task("", total=self.total, report=Report())
        return self

    def __exit__(self, *_) -> None:
        if self.progress:
            self.progress.stop()

    def start_at(self, step: int) -> None:
        """Starts the clock at `step`, where the task begins or resumes; later steps give the time left."""
        self.first_step, self.started = step, time.monotonic()
        if self.progress:
            self.progress.reset(self.task, completed=step)

    def update(self, step: int, report: Report = Report()) -> None:
        if self.first_step is None:  # an earlier attempt may have come as far as this
            self.start_at(step)
        if self.progress:
            self.progress.update(self.task, completed=step, report=report)
            return
        tenth, now = 10 * step // self.total, time.monotonic()
        if step != self.last_step:  # else it is told of what happens within a step
            self.last_step, self.stepped = step, now
        due = tenth != self.last_tenth or now - self.last_line >= self.line_seconds
        if not due or now - self.started < self.quiet_seconds:
            return
        self.last_tenth, self.last_line = tenth, now
        parts = [f"{self.title}: {self.unit} {step}/{self.total}", *report.losses, report.numbers]
        if step < self.total and (done := step - (self.first_step or 0)):  # the first step is not like the others
            left = (self.stepped - self.started) / done * (self.total - step) - (now - self.stepped)
            parts.append(f"{max(left, 0):.0f} s left")
        log.info("  ".join(part for part in parts if part))


class _Line(ProgressColumn):
    """The whole line, fitted to the terminal's current width."""

    def __init__(self, display: Display):
        super().__init__()
        self.display = display

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        time_left = "" if left is None else str(timedelta(seconds=round(left)))
        display, report = self.display, task.fields["report"]
        how_far = display.run_of_sweep, int(task.completed), display.total
        line = progress_line(display.console.width, *how_far, time_left, report, display.title)
        return Text(line, no_wrap=True)


BAR, SHORTEST = 12, 8  # columns of the bar, and of a name that is shortened


def progress_line(width: int, run: str, step: int, total: int, time_left: str, report: Report, name: str) -> str:
    """The parts that fit into `width` columns. A part that does not fit is left out; only the name is shortened.

    Accuracies and speed come first, then the progress.
    """
    done = BAR * step // max(1, total)
    parts = [run, "━" * done + "─" * (BAR - done), f"{step}/{total}", time_left, report.numbers, *report.losses]
    by_weight = [4, 2, 0, 3, 1, *range(5, len(parts))]
    kept: set[int] = set()
    room = width
    for index in by_weight:
        if parts[index] and (needed := len(parts[index]) + 2 * bool(kept)) <= room:
            kept.add(index)
            room -= needed
    shown = [part for index, part in enumerate(parts) if index in kept]
    if room >= SHORTEST + 2:
        shown.append(name if len(name) <= room - 2 else f"{name[: room - 3]}…")
    return "  ".join(shown)


class _Lines(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to `quiet_pipe`; rich would end the process."""
        raise BrokenPipeError


class _Terminal(logging.Handler):
    """Shows messages as plain lines: information on standard output, errors on standard error.

    Each message is written in one piece, so that lines of parallel runs do not mix. Lines are never wrapped.
    """

    def __init__(self, information_on_stderr: bool):
        super().__init__()
        self.information_on_stderr = information_on_stderr

    def emit(self, record: logging.LogRecord) -> None:
        error = record.levelno >= logging.ERROR
        message = printable(record.getMessage())
        console = _Lines(stderr=error or self.information_on_stderr, soft_wrap=True, highlight=False, emoji=False)
        console.print(f"error: {message}" if error else message, markup=False)


def show_messages(information_on_stderr: bool = False) -> None:
    """Shows the package's messages to the user. Every command calls it. Otherwise a host program's logging decides."""
    log.handlers = [_Terminal(information_on_stderr)]
    log.setLevel(logging.INFO)
    log.propagate = False
    log.disabled = False  # another package's logging configuration may have switched it off


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """A decorator for commands: they end quietly when nobody reads the output any more (`| head`).

    The exit status is then 128 + SIGPIPE, as a shell expects.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python writes buffered text when it ends
            os.dup2(nowhere, stream.fileno())
        sys.exit(128 + signal.SIGPIPE)


def stoppable(main: Callable[..., int]) -> Callable[..., int]:
    """A decorator for commands: Ctrl-C ends them with one sentence, a closed pipe (`| head`) ends them quietly.

    Both have the exit status that shells expect. A UserError has exit status 1.
    """

    @wraps(main)
    @quiet_pipe()
    def stopped(*arguments) -> int:
        show_messages()
        try:
            return main(*arguments)
        except KeyboardInterrupt:
            log.error("stopped by SIGINT")
            return 128 + signal.SIGINT
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            log.error(in_words(error))
            return 1

    return stopped


def shorten_list(names: Sequence[str], count: int = 5) -> str:
    """The first `count` names, and the number of the others."""
    count += len(names) == count + 1
    more = f", ... ({len(names) - count} more)" if len(names) > count else ""
    return ", ".join(map(spelled_out, names[:count])) + more


def duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def spelled_out(text: str, keep: str = "") -> str:
    """`text` with escape sequences (\\x1b, \\u202e) for characters that control a terminal or the writing direction.

    Bytes of file names that are not UTF-8, which no file or figure takes, become escape sequences, too.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # the last four are the full-width forms of the first


def no_formula(value: object) -> object:
    """Puts an apostrophe before a text that a spreadsheet would compute. Numbers, also as texts, stay as they are."""
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def quoted(word: str) -> str:
    """A word as it must be typed in a shell."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def printable(text: str) -> str:
    """A message of one or several lines that any terminal can show."""
    return spelled_out(text.expandtabs(4), keep="\n")


class CommandParser(argparse.ArgumentParser):
    """A parser of options, with --version. It refuses a setting KEY=VALUE, and a word without a letter, with UserError.

    Parsers of its subcommands are the same.
    """

    def __init__(self, **options):
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"%(prog)s {version('delta-transfer')}")

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        if not all(map(str.strip, words)):  # a path "" is the current folder
            raise UserError("A word of the command is empty. Is a variable of the shell not set?")
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        left_over = message.removeprefix("unrecognized arguments: ")
        if left_over != message and "=" in left_over and not left_over.startswith("-"):
            raise UserError(
                f"{self.prog} takes no settings: leave out {left_over} ({self.prog} --help lists its options)"
            )
        super().error(message)


def wrapped(text: str, width: int = 80) -> str:
    """`text` in lines of at most `width` letters. Indented lines stay; the explanation in a long one goes below it."""

    def of_line(line: str) -> str:
        indent = line[: len(line) - len(line.lstrip())] + "    "
        if len(line) <= width:
            return line
        named, explained = (re.split(r"(?<=\S) {2,}", line, maxsplit=1) + [""])[:2]
        first = textwrap.fill(named, width, subsequent_indent=indent)
        rest = textwrap.fill(explained, width, initial_indent=indent, subsequent_indent=indent)
        return f"{first}\n{rest}" if rest else first

    def of_paragraph(paragraph: str) -> str:
        if paragraph.startswith(" ") or "\n " in paragraph:
            return "\n".join(map(of_line, paragraph.split("\n")))
        return textwrap.fill(paragraph, width)

    return "\n\n".join(map(of_paragraph, text.strip("\n").split("\n\n")))


def command_parser(prog: str, text: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser of a command's arguments. Indented lines of its texts stay; paragraphs are wrapped."""
    return CommandParser(
        prog=prog,
        description=wrapped(text or ""),
        epilog=wrapped(epilog or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

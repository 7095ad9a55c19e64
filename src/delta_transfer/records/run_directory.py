"""A run on disk: its directory, whose files are complete or not there."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from ..common.console import log
from ..common.errors import RunFailed, UserError
from .files import naming, read_regular, remove_unfinished, sync, sync_folder, whole_file
from .integrity import problem_of, with_digest
from .locks import InUse, try_lock
from .metrics import measured
from .reading import LONGEST_RECORD, harmless

SCHEMA = 3  # of summary.json and the files beside it
LOCK = ".lock"
CLASSES = "classes.json"  # in a run's folder: the class names, in the order of the logits


class RunDirectory:
    """`<results_dir>/runs/<run_id>`, held by one process at a time. Use as a context manager.

    Raises locks.InUse if another process holds it, or has taken it over. If several processes share a run, one holds it
    and writes; the others read (`writes` False).
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoint_path = path / "last.pt"

    def __enter__(self) -> "RunDirectory":
        if not self.writes:
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path.parent)
        self._stack = ExitStack()
        self._check = self._stack.enter_context(try_lock(self.path / LOCK, self.path.name))
        remove_unfinished(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self._stack.close()

    def summary(self) -> dict[str, Any] | None:
        """The record of a run that ended, finished or failed; None if it did not end. Needs no lock.

        Raises UserError for a record of another version, which this one would misread, and for one that was changed.
        """
        path = self.path / "summary.json"
        try:
            content = read_regular(path, LONGEST_RECORD)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise UserError(f"{path}: {error}. Remove it, and make the run again.") from None
        try:
            summary = json.loads(content)
        except (ValueError, RecursionError):
            return None
        if not isinstance(summary, dict):
            return None
        if problem := unreadable(summary) or problem_of(summary):
            raise UserError(f"{path}: {problem}")
        return summary

    def start_anew(self, config_yaml: str) -> None:
        """Writes the configuration and removes the record of a failed attempt. A checkpoint stays for resuming."""
        if self.writes:
            (self.path / "summary.json").unlink(missing_ok=True)
        self.write("config.yaml", config_yaml.encode())

    def write(self, name: str, data: bytes) -> None:
        if self.writes:
            with self.open(name) as file:
                file.write(data)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """`whole_file` for the process that writes, as long as it holds the lock."""
        self._check()
        try:
            with whole_file(self.path / name, self._check) as file:
                yield file
        except FileNotFoundError:  # a process that took the run over removed the unfinished file
            self._check()
            raise

    def write_summary(self, summary: dict[str, Any]) -> None:
        if self.writes and self.metrics_path.exists():
            with open(self.metrics_path, "rb") as file:
                sync(file)
        self.write("summary.json", json.dumps(with_digest(summary), indent=2, allow_nan=False).encode())

    def remove_checkpoint(self) -> None:
        if self.writes:
            self._check()
            self.checkpoint_path.unlink(missing_ok=True)

    def clear_away(self) -> None:
        """Removes the lock and the checkpoint that a process left which was killed at the end of its run."""
        if self.writes and (self.checkpoint_path.exists() or (self.path / LOCK).exists()):
            with suppress(InUse, OSError), self:
                pass  # the lock is free, or it was left behind: now it is gone
            with suppress(OSError):
                self.checkpoint_path.unlink(missing_ok=True)

    def append_metrics(self, line: dict[str, Any]) -> None:
        if self.writes:
            self._check()
            with naming(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def metrics(self) -> str:
        return self.metrics_path.read_text(encoding="utf-8") if self.metrics_path.exists() else ""

    def restore_metrics(self, lines: str) -> None:
        """Goes back to the lines of a checkpoint, whatever happened to the file since: none is lost or doubled."""
        self.write(self.metrics_path.name, lines.encode())


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    summary: dict[str, Any]
    skipped: bool  # whether it was finished before

    def __str__(self) -> str:
        return ", ".join(measured(self.summary))


def finished_before(name: str, summary: dict[str, Any] | None, retry_failed: bool) -> RunResult | None:
    """The run if it is finished, else None. Raises RunFailed if it failed, unless `retry_failed`."""
    if summary is None:
        return None
    if summary.get("error") is not None:
        if retry_failed:
            return None
        reason = str(summary["error"]).splitlines()[0]
        raise RunFailed(f"{name} failed before: {reason} retry_failed=true tries it again.", summary)
    result = RunResult(summary, skipped=True)
    log.info(f"{name}: done, skipped ({result})")
    return result


def unreadable(summary: dict[str, Any]) -> str | None:
    """Why this version cannot read a record; None if it can."""
    schema = summary.get("schema")
    return None if schema == SCHEMA else f"its schema is {schema!r}, and this version reads {SCHEMA}"


def class_names(record: dict[str, Any]) -> tuple[str, ...]:
    """The class names of a finished run, in the order of the logits.

    Raises UserError for names that are missing or damaged.
    """
    path = record["folder"] / CLASSES
    try:
        names = harmless(record.get("classes") if record.get("bundled") else json.loads(read_regular(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(names, list) or len(names) != record.get("num_classes"):
        raise UserError(f"{path} does not hold the names of the run's {record.get('num_classes')} classes.")
    return tuple(map(str, names))


@contextmanager
def live_view(
    logging: str, directory: RunDirectory, first_iteration: int
) -> Iterator[Callable[[dict[str, Any]], object]]:
    """A function that shows a line of metrics in TensorBoard, with its files in the run's directory.

    metrics.jsonl stays the record. A resumed run replaces the lines of the iterations that it repeats.
    """
    if logging == "none" or not directory.writes:
        yield lambda line: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(directory.path, purge_step=first_iteration + 1) as writer:

        def show(line: dict[str, Any]) -> None:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, line["step"])

        yield show


@cache
def git_commit() -> str | None:
    """Commit of the checkout that tracks this file, "-dirty" appended if it has uncommitted changes."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not a virtual environment inside somebody's project
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")

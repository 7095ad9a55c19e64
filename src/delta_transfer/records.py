"""A run on disk: its identity, its directory, and writes that are whole or not there."""

import fcntl
import hashlib
import json
import os
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:  # delta-report reads records without Hydra
    from .config import RunConfig

SCHEMA = 1

# Where a run is made and what it logs, not what it is: these keys make no other run and no other row of a table.
NOT_IDENTITY = {
    *("device", "data_dir", "results_dir", "cache_dir", "logging", "dry_run"),
    *("dataset.download", "dataset.official"),
    *("schedule.log_every", "schedule.eval_every", "schedule.checkpoint_seconds"),
    "reg.attention.forward_images",
}


def run_identity(config: "RunConfig", dataset_fingerprint: str, weights_fingerprint: str) -> dict[str, Any]:
    """The resolved configuration with paths replaced by what lies there."""
    identity = asdict(config)
    for key in NOT_IDENTITY:
        *groups, name = key.split(".")
        part = identity
        for group in groups:
            part = part.get(group) or {}
        part.pop(name, None)
    identity["dataset"]["root"] = dataset_fingerprint
    identity["backbone"]["weights"] = weights_fingerprint
    return identity


def run_id(config: "RunConfig", identity: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.dataset.name}-{config.backbone.name}-{config.reg.name}-s{config.seed}-{digest}"


def write_atomically(path: Path, data: bytes) -> None:
    """Write, flush to disk, rename: a reader sees the old file or the whole new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes may write the same cache file
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


class RunDirectory:
    """`<results_dir>/runs/<run_id>`, held by one process at a time. Use as a context manager.

    Raises UserError if another process holds it. Of several processes that share a run one holds it and writes, the
    others read (`writes` False).
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoint_path = path / "last.pt"

    def __enter__(self) -> "RunDirectory":
        if not self.writes:
            return self
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held until __exit__
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"Another process is working in {self.path}.") from None
        return self

    def __exit__(self, *_) -> None:
        if self.writes:
            self._lock.close()

    def summary(self) -> dict[str, Any] | None:
        """The finished run's record; None if it did not finish."""
        try:
            return json.loads((self.path / "summary.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def start_anew(self, config_yaml: str) -> None:
        """Record the configuration and forget a failed attempt; a checkpoint stays, to resume from."""
        if self.writes:
            (self.path / "summary.json").unlink(missing_ok=True)
        self.write("config.yaml", config_yaml.encode())

    def write(self, name: str, data: bytes) -> None:
        if self.writes:
            write_atomically(self.path / name, data)

    def write_summary(self, summary: dict[str, Any]) -> None:
        self.write("summary.json", json.dumps(summary, indent=2, allow_nan=False).encode())

    def remove_checkpoint(self) -> None:
        if self.writes:
            self.checkpoint_path.unlink(missing_ok=True)

    def append_metrics(self, line: dict[str, Any]) -> None:
        if self.writes:
            with open(self.metrics_path, "a") as file:
                file.write(json.dumps(line) + "\n")

    def metrics_size(self) -> int:
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def truncate_metrics(self, size: int) -> None:
        """Forget lines written after a checkpoint; 0 starts anew."""
        if self.writes and self.metrics_path.exists():
            os.truncate(self.metrics_path, size)


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that tracks this file, "-dirty" appended if it has uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a virtual environment inside somebody's project
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")

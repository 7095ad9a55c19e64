"""One process at a time: a lock file that a second process waits for."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..console import say


@contextmanager
def held(path: Path, work: str) -> Iterator[None]:
    """Holds the lock file `path` while `work` is done ("builds X"); waits as long as another process holds it.

    The file stays: who waits for it has it open. Where there are no locks (some network disks, a folder of another
    person) it says so and goes on.
    """
    try:
        lock = open(path, "a")  # noqa: SIM115
    except OSError as error:
        _say_unlocked(path, work, error)
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that {work} ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            _say_unlocked(path, work, error)
        yield


def _say_unlocked(path: Path, work: str, error: OSError) -> None:
    say(f"{path} cannot be locked ({error}): let no other process run that {work}")

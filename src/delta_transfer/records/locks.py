"""One process at a time, on one machine or on several that share a disk.

A process holds a lock as long as the lock's file exists. The file is a lease of the package filelock: it names its
owner (host, process), which touches it every ten seconds. If the owner's process is gone, another process of the same
machine takes the lock over at once. Another machine does so when the file has not been touched for LEASE_SECONDS on its
own clock; clocks that differ or jump do not matter. The disk must create files exclusively, as local disks and NFS
since version 3 do.
"""

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from ..common.console import log
from ..common.errors import UserError

LEASE_SECONDS = 30.0
DAMAGED_SECONDS = 3.0
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL)  # errors of disks without locks
Check = Callable[[], None]  # raises InUse if the lock is no longer this process' own; reads a small file


class InUse(UserError):
    """Another process holds the lock, or took it over because this one did not run for too long."""


@contextmanager
def try_lock(path: Path, what: str) -> Iterator[Check]:
    """Holds the lock file `path` of `what` ("the run ..."). Raises InUse if a living process holds it.

    If the owner is on another machine, this waits up to 1.5 * LEASE_SECONDS to learn whether it is alive. A damaged
    lock file, which names no owner, gives way after DAMAGED_SECONDS.
    """
    lease = _lease(path)
    try:
        try:
            lease.acquire(timeout=0)
        except Timeout:
            owner = lease.owner
            if owner is None:
                _break_damaged(lease)
            elsewhere = owner is not None and owner.hostname != _this_machine()
            lease.acquire(timeout=1.5 * LEASE_SECONDS if elsewhere else 0)
    except (Timeout, LeaseSettingsMismatch):
        raise InUse(f"{what} is in progress: {_owner(lease)}") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:  # a full disk, a folder that cannot be written
            raise
        log.info(f"{path} cannot be locked ({error}): do not start this run in another process")
        yield lambda: None
        return
    try:
        yield lambda: _check(lease, what)
    finally:
        lease.release()


@contextmanager
def wait_for_lock(path: Path, work: str) -> Iterator[Check]:
    """Holds the lock file `path` while `work` is done ("builds X"); waits as long as another process holds it.

    If the file system allows no lock (in another user's folder), a message says so, and the work goes on without one.
    """
    lease = _lease(path)
    try:
        try:
            lease.acquire(timeout=0)
        except Timeout:
            log.info(f"waiting for another process that {work}: {_owner(lease)} ...")
            lease.acquire()
    except OSError as error:
        log.info(f"{path} cannot be locked ({error}): let no other process run that {work}")
        yield lambda: None
        return
    try:
        yield lambda: _check(lease, str(path))
    finally:
        lease.release()


def _lease(path: Path) -> SoftFileLease:
    return SoftFileLease(path, lease_duration=LEASE_SECONDS, on_compromise=lambda _: None)


def _break_damaged(lease: SoftFileLease) -> None:
    """Waits for a process that is just starting or ending, then removes a lock that still names no owner.

    A crash or a full disk may leave an empty lock file, which filelock would keep for good.
    """
    end = time.monotonic() + DAMAGED_SECONDS
    while os.path.lexists(lease.lock_file) and lease.owner is None:
        if time.monotonic() > end:
            lease.force_break()
            return
        time.sleep(0.05)


def _check(lease: SoftFileLease, what: str) -> None:
    owner = lease.owner
    if owner is None or owner.token != lease.token:
        raise InUse(f"{what} was taken over by {_owner(lease)}: this process did not run for too long, and stops here")


def _owner(lease: SoftFileLease) -> str:
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname}" if owner else "a process that is just ending"


@cache
def _this_machine() -> str:
    """This machine's name in leases, which differs between containers."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "name") as lease:
        owner = lease.owner
    assert owner is not None
    return owner.hostname

"""Ctrl-C and SIGTERM: a run that trains finishes its step and saves its state before it ends."""

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_deferred: Collection[int] = ()
_received: int | None = None
_speaks = True


class Stopped(KeyboardInterrupt):
    """This process was asked to end, and ends."""


def received() -> int | None:
    """The number of the signal that asked this process to end; None if there was none."""
    return _received


@contextmanager
def stoppable(worker: bool = False) -> Iterator[None]:
    """Within this context a signal raises Stopped at once, unless it is `deferred`.

    worker: the process waits for another job afterwards, and from then on only notes a signal.
    """
    global _deferred, _speaks
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _deferred, _speaks = (), not worker
    try:
        yield
    finally:
        if worker:
            _deferred = SIGNALS
        else:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def deferred(numbers: Collection[int] = SIGNALS) -> Iterator[None]:
    """Within this context the first of these signals is only noted (`received`); a second Ctrl-C raises Stopped."""
    global _deferred
    before, _deferred = _deferred, numbers
    try:
        yield
    finally:
        _deferred = before


def forget() -> None:
    """Forgets the signal, for a new command in the same process."""
    global _received
    _received = None


def _handle(number: int, frame: object) -> None:
    global _received
    again, _received = _received is not None, number
    if number not in _deferred or (again and number == signal.SIGINT):
        raise Stopped
    if _speaks and not again:
        os.write(
            2, b"\nstopping as soon as the state is saved; Ctrl-C ends at once\n"
        )  # print may be interrupted itself

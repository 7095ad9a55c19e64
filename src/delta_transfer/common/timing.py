"""Times of work on this machine."""

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter, thread_time

import torch

ROUNDS = 3  # least number of rounds of short work


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float = 0.5) -> float:
    """Seconds of `work`, as `seconds_in_turn` measures them."""
    return seconds_in_turn([work], device, at_least)[0]


def seconds_in_turn(works: Sequence[Callable[[], object]], device: torch.device, at_least: float = 0.5) -> list[float]:
    """Seconds of each work: the median of repetitions in turn, for `at_least` seconds, after one that warms up.

    On a CPU they are processor seconds of this thread, which other programs on the machine hardly lengthen.
    """
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock = perf_counter if device.type == "cuda" else thread_time
    for work in works:
        work()
    times: list[list[float]] = []
    spent = 0.0
    while not times or spent < at_least or (len(times) < ROUNDS and spent < 4 * at_least):
        times.append([])
        for work in works:
            synchronize()
            start = clock()
            work()
            synchronize()
            times[-1].append(clock() - start)
        spent += sum(times[-1])
    return [median(found) for found in zip(*times, strict=True)]

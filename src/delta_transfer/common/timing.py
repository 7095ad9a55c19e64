"""How long work takes on this machine."""

from collections.abc import Callable
from time import perf_counter

import torch


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float = 0.5) -> float:
    """Seconds of `work`: the shortest repetition within `at_least` seconds, since other programs may disturb it."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    while sum(times) < at_least:
        synchronize()
        start = perf_counter()
        work()
        synchronize()
        times.append(perf_counter() - start)
    return min(times)

"""The machine: its name, memory, versions, and how long work takes on it."""

import contextlib
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch


def images_at_once(device: torch.device) -> int:
    """How many images go through a frozen network together, where the program may choose.

    A GPU takes many. A CPU takes so few that their feature maps stay in its caches, which is a sixth faster than 32.
    """
    return 256 if device.type == "cuda" else 4 * torch.get_num_threads()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"cpu: {model}, {torch.get_num_threads()} threads"


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the peak so far, so that a later job of a sweep does not report it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """The peak in bytes: that of the GPU's allocator, or of the process on a CPU (None where it is unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float = 0.5) -> float:
    """Seconds of `work`: the shortest repetition within `at_least` seconds, since other programs may disturb it."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    while sum(times) < at_least:
        synchronize()
        start = perf_counter()
        work()
        synchronize()
        times.append(perf_counter() - start)
    return min(times)


def versions() -> dict[str, str]:
    packages = ("delta-transfer", "torch", "torchvision", "numpy", "pillow")
    return {"python": platform.python_version()} | {name.replace("-", "_"): version(name) for name in packages}

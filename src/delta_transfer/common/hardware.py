"""The machine a run is made on: names, memory, times, versions."""

import contextlib
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch


def images_at_once(device: torch.device) -> int:
    """How many images go through a frozen network together, where it is ours to choose.

    Many on a GPU. On a CPU so few that their feature maps stay in its caches: a sixth faster than a batch of 32.
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
    """So that a later job of a sweep does not report the peak of an earlier one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the GPU's allocator, or of the whole process on a CPU (Linux; elsewhere unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def seconds_of(work: Callable[[], object], device: torch.device, at_least: float = 0.5) -> float:
    """The shortest of the repetitions of `work` in `at_least` seconds, or of one: others may disturb it."""
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

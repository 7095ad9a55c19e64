"""The machine a run is made on: device, precision, memory, versions."""

import contextlib
import fcntl
import os
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch

from . import distributed
from .config import RunConfig, require
from .console import say


def set_up(config: RunConfig) -> torch.device:
    """The device of the run; replaces `precision=auto` by what it means there."""
    device = pick_device(config.device)
    distributed.join(device)
    config.precision = pick_precision(config.precision, device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(config.deterministic)
    reset_peak_memory(device)
    return device


def pick_device(wanted: str) -> torch.device:
    available = torch.cuda.is_available()
    require(wanted != "cuda" or available, "device=cuda, but PyTorch sees no CUDA device; use device=cpu or auto.")
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:  # torchrun has dealt out the GPUs
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(index < count, f"There are more processes than GPUs ({count}): torchrun --nproc-per-node={count}.")
    elif torch.cuda.device_count() > 1:
        index = claim_gpu()
    else:
        return torch.device("cuda")
    torch.cuda.set_device(index)  # what names no device (synchronize, is_bf16_supported) means this one
    return torch.device("cuda", index)


@cache  # a process keeps its GPU, through all jobs of a sweep
def claim_gpu() -> int:
    """The first GPU that no other delta-run of this person on this machine has: a lock held until the process ends."""
    count = torch.cuda.device_count()
    for index in range(count):
        name = f"delta-run-{os.getuid()}-{torch.cuda.get_device_properties(index).uuid}.lock"
        lock = os.open(Path(tempfile.gettempdir()) / name, os.O_WRONLY | os.O_CREAT, 0o600)  # deliberately not closed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return index
        except BlockingIOError:
            os.close(lock)
    index = os.getpid() % count  # spreads them, somehow
    say(f"All {count} GPUs have a run already: GPU {index} gets one more")
    return index


def pick_precision(wanted: str, device: torch.device) -> str:
    if wanted == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        say("This CPU has no arithmetic for bf16: it will be far slower than precision=fp32")
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


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

"""The machine a run is made on: device, precision, memory, versions."""

import fcntl
import os
import tempfile
from functools import cache
from pathlib import Path

import torch

from ..common.console import log
from ..common.hardware import reset_peak_memory
from ..common.options import require
from ..config import RunConfig
from . import processes as distributed


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
    log.info(f"All {count} GPUs have a run already: GPU {index} gets one more")
    return index


def pick_precision(wanted: str, device: torch.device) -> str:
    if wanted == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.info("This CPU has no arithmetic for bf16: it will be far slower than precision=fp32")
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"

"""The devices and processes of a run, and the signals that stop it.

Several processes (torchrun) can make one run: they share the batch, and the first process alone writes. Without
torchrun there is one process, and these functions do nothing.
"""

import contextlib
import fcntl
import os
import platform
import signal
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..common import cores
from ..common.console import log, log_once
from ..common.options import require
from ..models.batchnorm import sharing

# --- One process: device and precision ---


def set_up(wanted: str, deterministic: bool) -> torch.device:
    """The device of the run. This process joins the others that share the run."""
    device = pick_device(wanted)
    join(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for that
    torch.use_deterministic_algorithms(deterministic)
    reset_peak_memory(device)
    return device


def pick_device(wanted: str) -> torch.device:
    on_cpu = uses_cpu(wanted)
    require(wanted != "cuda" or not on_cpu, "device=cuda, but PyTorch sees no CUDA device; use device=cpu or auto.")
    if on_cpu:
        share_cores()
        return torch.device("cpu")
    if "LOCAL_RANK" in os.environ:  # torchrun has dealt out the GPUs
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(index < count, f"There are more processes than GPUs ({count}): torchrun --nproc-per-node={count}.")
    else:
        index = claim_gpu()
    torch.cuda.set_device(index)  # the device of calls that name none (synchronize, is_bf16_supported)
    return torch.device("cuda", index)


def uses_cpu(wanted: str) -> bool:
    return wanted == "cpu" or not torch.cuda.is_available()


@cache  # said once per process
def share_cores() -> None:
    """Takes no more threads than a container allows cores, and logs how much other programs slow this one down.

    A command gets the cores that threads of other programs leave free, or as much as each of these threads gets: its
    own threads wait for one another. Two threads of small_resnet on two cores take 2.4 times as long beside two busy
    threads, and 6.0 times beside six (docs/performance.md); this says 3 and 7.
    """
    if not cores.of_a_command:  # another program chooses its threads itself
        return
    keep_to_quota()
    threads, others, there = torch.get_num_threads(), cores.others, os.cpu_count() or 1
    share = min(threads, max(there - others, there / (others + 1)))
    if threads / share >= cores.NOTABLE:
        hint = "; OMP_NUM_THREADS=1 helps small networks" if share <= 1 < threads else ""
        slower = f"this takes about {threads / share:.0f} times as long{hint}"
        log.info(f"{there} cores, load {others:.0f} of other programs: {slower}")


def keep_to_quota() -> None:
    """Takes no more threads than a container allows cores, unless the user has chosen their number."""
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores.USABLE:
        torch.set_num_threads(cores.USABLE)


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
    index = os.getpid() % count  # spreads the runs over the GPUs
    log.info(
        f"Every GPU has a run already ({count} in all), and GPU {index} gets one more. Runs that share a GPU take "
        "longer than one after the other, unless they wait for the CPU"
    )
    return index


def pick_precision(wanted: str, device: torch.device) -> str:
    if wanted == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log_once("This CPU has no arithmetic for bf16: it will be far slower than precision=fp32")
    if wanted != "auto":
        return wanted
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks compute: bf16 where `precision` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """The context in which networks compute in fp32: neither bf16 nor TF32."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"cpu: {model}, {threads_in_words()}"


def threads_in_words() -> str:
    """4 threads: how many compute in this process."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


def reset_peak_memory(device: torch.device) -> None:
    """Forgets the peak so far, so that a later job of a sweep does not report it."""
    global _peak
    _peak = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _forget_resident()


def peak_memory(device: torch.device) -> int | None:
    """The peak in bytes since `reset_peak_memory`: of the GPU's allocator, or of the process on a CPU.

    The process' own memory has no pages of mapped files such as the image store, which the system can reclaim. Call it
    regularly: between two calls such pages count as they are at the second. None where it is unknown.
    """
    global _peak
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines if line[-1] == "kB"}
        _peak = max(_peak, 1024 * (kilobytes["VmHWM"] - kilobytes["RssFile"] - kilobytes["RssShmem"]))
    except (OSError, KeyError):
        return None
    _forget_resident()
    return _peak


def _forget_resident() -> None:
    """Sets the system's peak of this process back to what is resident now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


_peak = 0  # of the process' own memory on a CPU, until the last look


def versions() -> dict[str, str]:
    packages = ("delta-transfer", "torch", "torchvision", "numpy", "pillow")
    return {"python": platform.python_version()} | {name.replace("-", "_"): version(name) for name in packages}


# --- Several processes ---


def shared() -> bool:
    """Whether torchrun started this process as one of several that share a run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: torch.device) -> None:
    """Meets the other processes that torchrun started, once."""
    if shared() and not dist.is_initialized():
        # The others wait as long as the first one decodes images or computes channel attention.
        cuda = device.type == "cuda"
        options = {"backend": "nccl", "device_id": device} if cuda else {"backend": "gloo"}
        dist.init_process_group(**options, timeout=timedelta(days=1))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def rank0_first() -> Iterator[None]:
    """The first process enters alone; the others follow and find what it wrote."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and processes() > 1:
        dist.barrier()


def broadcast_from_rank0(read: Callable[[], Any]) -> Any:
    """What `read` returns in the first process, for all processes."""
    values = [read() if rank() == 0 else None]
    if processes() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def made_with(device: torch.device) -> str:
    """What decides the order in which numbers are added, and therefore their last bits."""
    return f"torch {torch.__version__} on {device_name(device)}, {processes()} processes"


def share() -> slice:
    """This process' images of a batch."""
    return slice(rank(), None, processes())


def average(values: Tensor) -> Tensor:
    """The mean over processes."""
    if processes() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= processes()
    return values


def gather(values: Tensor) -> Tensor:
    """The tensors (on the CPU) of all processes, one after the other along the first axis."""
    if processes() == 1:
        return values
    parts: list[Any] = [None] * processes()
    dist.all_gather_object(parts, values)
    return torch.cat(parts)


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """`network`, whose gradients are averaged over processes in the backward pass."""
    if processes() == 1:
        return network
    # The warning is about copies of the gradients of 1 x 1 convolutions in channels_last, which are small.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def synchronise_batchnorm(network: nn.Module, device: torch.device) -> None:
    """BatchNorm takes the statistics of the whole batch, not of one process, so that more GPUs give the same run."""
    if processes() == 1:
        return
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):  # timm's have an activation inside
            # PyTorch's SyncBatchNorm works on GPUs only.
            make = nn.SyncBatchNorm if device.type == "cuda" else WholeBatchNorm
            network.set_submodule(name, sharing(module, make(module.num_features)))


class _Average(torch.autograd.Function):
    """The mean over processes; so is the gradient, as DistributedDataParallel averages the loss over processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return average(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return average(gradient)


class WholeBatchNorm(nn.BatchNorm2d):
    """BatchNorm in training mode over the images of all processes, (B, C, H, W) each, on any device."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        values = images.float() if images.dtype == torch.bfloat16 else images
        # The mean first: E[x^2] - E[x]^2 loses digits.
        mean: Tensor = _Average.apply(values.mean(dim=(0, 2, 3)))
        centred = values - mean.view(-1, 1, 1)
        variance: Tensor = _Average.apply(centred.square().mean(dim=(0, 2, 3)))
        with torch.no_grad():
            count = processes() * values.numel() / values.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(images.dtype)


# --- Ctrl-C and SIGTERM: a run finishes its step and saves its state before it ends ---

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_deferred: Collection[int] = ()
_received: int | None = None
_speaks = True


class Stopped(KeyboardInterrupt):
    """This process was asked to end, and ends."""


def stop_signal() -> int | None:
    """The number of the signal that asked this process to end; None if there was none."""
    return _received


@contextmanager
def stop_enabled(worker: bool = False) -> Iterator[None]:
    """In this context a signal raises Stopped at once, unless it is `stop_deferred`.

    worker: afterwards the process waits for another job, and only notes a signal.
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
def stop_deferred(numbers: Collection[int] = SIGNALS) -> Iterator[None]:
    """In this context the first of these signals is only noted (`stop_signal`); a second Ctrl-C raises Stopped."""
    global _deferred
    before, _deferred = _deferred, numbers
    try:
        yield
    finally:
        _deferred = before


def forget_stop() -> None:
    """Forgets the signal, for a new command in the same process."""
    global _received
    _received = None


def _handle(number: int, frame: object) -> None:
    global _received
    again, _received = _received is not None, number
    if number not in _deferred or (again and number == signal.SIGINT):
        raise Stopped
    if _speaks and not again:
        os.write(2, b"\nstopping at the next safe point; Ctrl-C ends at once\n")  # print may be interrupted itself

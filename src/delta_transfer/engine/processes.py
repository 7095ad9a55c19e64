"""One run in several processes (torchrun): the batch is shared, the first process alone writes.

Without torchrun there is one process, and nothing here does anything.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..models.batchnorm import sharing


def join(device: torch.device) -> None:
    """Meet the other processes that torchrun started, once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
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
    """The first process goes in alone, the others after it: they find what it wrote."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and processes() > 1:
        dist.barrier()


def broadcast_from_rank0(read: Callable[[], Any]) -> Any:
    """What `read` returns in the first process, so that all go on alike."""
    values = [read() if rank() == 0 else None]
    if processes() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def share() -> slice:
    """Which images of a batch are this process' own."""
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
    parts: list = [None] * processes()
    dist.all_gather_object(parts, values)
    return torch.cat(parts)


def parallel(network: nn.Module, device: torch.device) -> nn.Module:
    """`network`, whose gradients are averaged over processes in the backward pass."""
    if processes() == 1:
        return network
    # Of 1 x 1 convolutions in channels_last: it copies their gradients, which are small.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def synchronise_batchnorm(network: nn.Module, device: torch.device) -> None:
    """Statistics of the whole batch instead of a process' share, so that more GPUs do not make it another run."""
    if processes() == 1:
        return
    for name, module in list(network.named_modules()):
        if type(module) is nn.BatchNorm2d:
            # PyTorch's works on GPUs only.
            whole = (
                nn.SyncBatchNorm.convert_sync_batchnorm(module)
                if device.type == "cuda"
                else sharing(module, WholeBatchNorm(module.num_features))
            )
            network.set_submodule(name, whole)


class _Average(torch.autograd.Function):
    """The mean over processes; so is the gradient, as DistributedDataParallel averages the loss over processes."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return average(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return average(gradient)


class WholeBatchNorm(nn.BatchNorm2d):
    """BatchNorm in training mode over the images of all processes, (B, C, H, W) each, on any device."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        values = images.float() if images.dtype == torch.bfloat16 else images
        # The mean first: E[x^2] - E[x]^2 loses digits.
        mean = _Average.apply(values.mean(dim=(0, 2, 3)))
        centred = values - mean.view(-1, 1, 1)
        variance = _Average.apply(centred.square().mean(dim=(0, 2, 3)))
        with torch.no_grad():
            count = processes() * values.numel() / values.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(images.dtype)

"""Compares the peak memory of a training step of DELTA with that of L2, launched and replayed as a CUDA graph.

python scripts/bench_memory.py          with --device cpu | cuda, --output FILE
"""

import subprocess
import sys

import torch

from bench_step import batch_of, step_of
from benchmarking import Report, arguments
from delta_transfer.engine.devices import peak_memory, reset_peak_memory
from delta_transfer.engine.graphed_step import GraphedStep
from delta_transfer.engine.loop import train_step


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    report = Report(options)
    batch = 64 if options.device.type == "cuda" else 16
    of = ("resnet18", 2, 32) if options.quick else ("resnet50", batch, 224)
    memory(report, "memory_delta", *of, options.device)
    if options.device.type == "cuda":
        memory(report, "memory_delta_replayed", *of, options.device, replayed=True)
    else:
        report.add("memory_delta_replayed", None, "there is no GPU")
    report.write()


def memory(
    report: Report, key: str, name: str, batch: int, size: int, device: torch.device, replayed: bool = False
) -> None:
    """Peak memory of a step beyond that of a process with PyTorch, for each method in its own process."""
    bytes_of = {}
    for method in ("l2", "delta"):
        of = method, name, batch, size, device.type, replayed
        code = f"import bench_memory as b; b.print_memory(*{of!r})"
        printed = subprocess.run(
            [sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True
        )
        bytes_of[method] = int(printed.stdout.split()[-1])
    amounts = ", ".join(f"{method} {amount / 2**20:,.0f} MiB" for method, amount in bytes_of.items())
    report.add(key, bytes_of["delta"] / bytes_of["l2"], f"{name}, {size} px, batch {batch}; {amounts}")


def print_memory(method: str, name: str, batch: int, size: int, device_type: str, replayed: bool) -> None:
    """replayed: what the GPU's allocator reserved, since a recording keeps its memory beside that of other steps."""
    device = torch.device(device_type)
    if device_type == "cpu":
        torch.set_num_threads(1)
    batch_of(batch, size, device)  # PyTorch itself and the device are set up
    reset_peak_memory(device)
    before = 0 if device_type == "cuda" else peak_memory(device)
    precision, kind = "bf16" if device_type == "cuda" else "fp32", GraphedStep() if replayed else train_step
    step = step_of(method, name, batch, size, device, precision, step=kind)
    reset_peak_memory(device)
    for _ in range(4 if replayed else 3):  # a graph is recorded in the third
        step()
    print(torch.cuda.max_memory_reserved(device) if replayed else peak_memory(device) - before)


if __name__ == "__main__":
    main()

"""Compares the peak memory of a training step of DELTA with that of L2.

python scripts/bench_memory.py          with --device cpu | cuda, --output FILE
"""

import subprocess
import sys

import torch

from bench_step import batch_of, step_of
from benchmarking import Report, arguments
from delta_transfer.engine.devices import peak_memory, reset_peak_memory


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    report = Report(options)
    batch = 64 if options.device.type == "cuda" else 16
    memory(report, *(("resnet18", 2, 32) if options.quick else ("resnet50", batch, 224)), options.device)
    report.write()


def memory(report: Report, name: str, batch: int, size: int, device: torch.device) -> None:
    """Peak memory of a step beyond that of a process with PyTorch, for each method in its own process."""
    bytes_of = {}
    for method in ("l2", "delta"):
        code = f"import bench_memory as b; b.print_memory({method!r}, {name!r}, {batch}, {size}, {device.type!r})"
        printed = subprocess.run(
            [sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True
        )
        bytes_of[method] = int(printed.stdout.split()[-1])
    amounts = ", ".join(f"{method} {amount / 2**20:,.0f} MiB" for method, amount in bytes_of.items())
    report.add("memory_delta", bytes_of["delta"] / bytes_of["l2"], f"{name}, {size} px, batch {batch}; {amounts}")


def print_memory(method: str, name: str, batch: int, size: int, device_type: str) -> None:
    device = torch.device(device_type)
    if device_type == "cpu":
        torch.set_num_threads(1)
    batch_of(batch, size, device)  # PyTorch itself and the device are set up
    reset_peak_memory(device)
    before = 0 if device_type == "cuda" else peak_memory(device)
    step = step_of(method, name, batch, size, device, "bf16" if device_type == "cuda" else "fp32")
    reset_peak_memory(device)
    for _ in range(3):
        step()
    print(peak_memory(device) - before)


if __name__ == "__main__":
    main()

"""Measures how much other programs slow a training on a CPU down: none, two, and six that are always busy.

    python scripts/bench_busy.py --output FILE.json

Each training has its own process, since threads learn how long to spin when torch is imported: once as PyTorch has it,
and once as our commands set it for the load that they find. Beside others a row is the speed with the latter divided by
that of a program's fair share of the cores; alone it is divided by the speed as PyTorch has it. Other programs on the
machine do not count as neighbours, but disturb: the detail has the load.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from statistics import median

from benchmarking import Report, arguments
from delta_transfer.common.cores import SETTINGS

NETWORKS = {"small_resnet": (32, 32), "resnet18": (128, 16), "resnet50": (224, 8)}  # pixels and images of a step
NEIGHBOURS = (0, 2, 6)
TRAINING = """
import os, sys, time
from delta_transfer.common.cores import begin_command

if sys.argv[5] == "ours":
    begin_command()
import torch, torchvision
import torch.nn.functional as F
from delta_transfer.models.zoo import NETWORKS

name, side, batch, seconds = sys.argv[1], *map(int, sys.argv[2:5])
network = NETWORKS[name](10) if name in NETWORKS else torchvision.models.get_model(name, num_classes=10)
network = network.to(memory_format=torch.channels_last).train()
optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9, fused=True)
images, labels = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last), torch.zeros(batch).long()
rates, end = [], None
while end is None or time.perf_counter() < end or len(rates) < 2:
    start = time.perf_counter()
    F.cross_entropy(network(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    if end is None:  # the first step warms up
        end = time.perf_counter() + seconds
    else:
        rates.append(batch / (time.perf_counter() - start))
print(sorted(rates)[len(rates) // 2], os.environ.get("GOMP_SPINCOUNT", "unset"))
"""


def main() -> None:
    options = arguments("Measure what other programs on the machine cost a training.")
    report = Report(options)
    networks = {"small_resnet": (16, 4)} if options.quick else NETWORKS
    rounds, seconds = (1, 0) if options.quick else (3, 5)
    for name, size in networks.items():
        for count in NEIGHBOURS:
            rates: dict[str, list[float]] = {"PyTorch's": [], "ours": []}
            spins = set()
            with busy_programs(count):
                for number in range(rounds):
                    for whose in list(rates)[:: 1 if number % 2 else -1]:  # the order alternates
                        rate, spin = images_per_second(name, size, seconds, whose)
                        rates[whose].append(rate)
                        spins |= {spin} if whose == "ours" else set()
            as_it_is, ours = map(median, rates.values())
            if count == 0:
                alone = as_it_is
            what = f"{name}, {size[0]} px, {size[1]} images; images/s: {alone:.1f} alone, {as_it_is:.1f} as PyTorch "
            what += f"has it, {ours:.1f} with our GOMP_SPINCOUNT ({', '.join(sorted(spins))}); medians of {rounds}"
            fair = alone * share(count)
            report.add(f"busy_{count}_{name}", ours / fair, what, as_it_is / fair)
    report.write()


def share(neighbours: int) -> float:
    """A program's fraction of all cores beside `neighbours` others of one thread each."""
    cores = os.cpu_count() or 1
    return max(cores - neighbours, cores / (neighbours + 1)) / cores


def images_per_second(name: str, size: tuple[int, int], seconds: int, whose: str) -> tuple[float, str]:
    """The median over steps of a training of `seconds`, in a process of its own, and its GOMP_SPINCOUNT."""
    environment = {key: value for key, value in os.environ.items() if key not in (*SETTINGS, "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", TRAINING, name, *map(str, (*size, seconds)), whose]
    rate, spins = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return float(rate), spins


@contextmanager
def busy_programs(count: int):
    """In this context `count` programs of one thread are always busy."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


if __name__ == "__main__":
    main()

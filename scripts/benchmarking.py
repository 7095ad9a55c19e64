"""Common parts of the benchmarks: timings taken side by side, and a JSON file of measured rows."""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

import torch

from delta_transfer.engine.devices import device_name, pick_device, versions
from delta_transfer.records.files import write_atomically
from delta_transfer.records.run_directory import timestamp


@dataclass(frozen=True)
class Ratio:
    """The ratio of two works, over rounds in which both were timed one after the other."""

    value: float  # of the fastest round of each, which other programs disturb least
    low: float  # quartiles over rounds
    middle: float
    high: float

    def __str__(self) -> str:
        return f"median of rounds {self.middle:.2f}, quartiles {self.low:.2f} to {self.high:.2f}"


class Timings:
    """Seconds of each work in each round. clock: processor time of this process on a CPU, wall time on a GPU.

    Other programs lengthen wall time more than processor time, and not equally for all works.
    """

    def __init__(self, clock: dict[str, list[float]], wall: dict[str, list[float]]):
        self.clock, self.wall = clock, wall

    def ratio(self, work: str, to: str, wall: bool = False) -> Ratio:
        taken = self.wall if wall else self.clock
        paired = sorted(a / b for a, b in zip(taken[work], taken[to], strict=True))
        low, middle, high = statistics.quantiles(paired, n=4) if len(paired) > 1 else 3 * paired
        return Ratio(min(taken[work]) / min(taken[to]), low, middle, high)

    def seconds(self, work: str) -> float:
        """Seconds of the fastest round."""
        return min(self.clock[work])


def side_by_side(
    works: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warm_up: int = 1,
    warm: bool = False,
    long: bool = False,
) -> Timings:
    """Times all works in every round, each round in another order.

    On a GPU each runs ten times in a row unless it is `long`, since training does not wait for the GPU after each step.
    warm: each runs once before it is timed, since its memory goes cold between its turns, unlike in training.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    clock_now = perf_counter if device.type == "cuda" else process_time
    repeat = 10 if device.type == "cuda" and not long else 1
    clock, wall = ({name: [] for name in works} for _ in range(2))
    for _ in range(warm_up):
        for work in works.values():
            work()
    gc.collect()
    names = list(works)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if warm:
                works[name]()
            synchronize()
            start, start_wall = clock_now(), perf_counter()
            for _ in range(repeat):
                works[name]()
            synchronize()
            clock[name].append((clock_now() - start) / repeat)
            wall[name].append((perf_counter() - start_wall) / repeat)
    return Timings(clock, wall)


def arguments(purpose: str, one_thread: bool = False) -> argparse.Namespace:
    """The command line. one_thread: on a CPU, where the processor time of several threads contains waiting."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="JSON file for the measured rows")
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks and few rounds: tries the script, measures nothing"
    )
    options = parser.parse_args()
    options.device = pick_device(options.device)
    if one_thread and options.device.type == "cpu":
        torch.set_num_threads(1)
    return options


class Report:
    """Measured rows, printed as they come and kept in a file."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.rows = options, {}
        self.machine = device_name(options.device)
        print(f"# {Path(sys.argv[0]).name} on {self.machine}", flush=True)

    def add(self, key: str, value: float | None, detail: str, before: float | None = None) -> None:
        """Adds a row. value None: it cannot be measured on this machine, for the reason in `detail`.

        before: the same without what makes it better, measured beside it.
        The load is that of the last minute, this program included.
        """
        if value is not None:
            detail += f"; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        self.rows[key] = {"value": value, "detail": detail} | ({} if before is None else {"before": before})
        print(f"{key:28} {'-' if value is None else format(value, '.3g'):>8}  {detail}", flush=True)

    def write(self) -> None:
        if self.options.output is None:
            return
        content = {
            "machine": self.machine,
            "versions": versions(),
            "commit": commit_of_code(),
            "date": timestamp(),
            "rows": self.rows,
        }
        self.options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.options.output, (json.dumps(content, indent=2) + "\n").encode())


def commit_of_code() -> str | None:
    """The last commit that changed the code; "-dirty" if it is changed now; None without a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent.parent), *words, "--", "src", "conf", "scripts"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h", "--abbrev=12") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

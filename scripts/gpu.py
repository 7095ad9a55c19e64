"""What a machine with a GPU is wanted for, in one command: the comparison on real images, then all benchmarks.

    python scripts/gpu.py --images CUB --weights RESNET50 --output OUT --minutes 9

CUB: the publisher's folder of CUB-200-2011 or a part of it; RESNET50: a file of weights. Five methods, five seeds, 224
pixels. Stops in time; the same command goes on where it stopped. The small files to keep are in OUT/records and
results/published/benchmarks. The benchmarks begin when 5/9 of the time are left, at the latest. It chooses nothing:
alpha is what each method's default says, or --overrides.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).parent
METHODS = "l2,l2_fe,l2_sp,delta_noatt,delta"


def within(seconds: float, *command: str | Path) -> int | None:
    """The exit status of `command`; None if it was not done in time and was ended."""
    if seconds <= 0:
        return None
    with subprocess.Popen([sys.executable, *map(str, command)], start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # with the processes that it started
            return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--overrides", nargs="*", default=[], help="more of delta-run's, e.g. schedule.iterations=100")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    comparison = [
        *("-m", "delta_transfer.train", "-m", "+experiment=table_quick", f"reg={METHODS}", "seed=range(5)"),
        *(f"dataset.root={options.images.resolve()}", f"backbone.weights={options.weights.resolve()}"),
        *("backbone=resnet50", "backbone.image_size=224", "backbone.resize=256", "schedule.iterations=300"),
        *(f"results_dir={options.output.resolve()}", f"device={options.device}", *options.overrides),
    ]
    trained = within(end - time.monotonic() - 60 * options.minutes * 5 / 9, *comparison)
    measured = within(end - time.monotonic() - 5, SCRIPTS / "bench.py", "--device", options.device)
    within(30, SCRIPTS / "publish_records.py", options.output, options.output / "records")
    left = [name for name, status in (("comparison", trained), ("benchmarks", measured)) if status != 0]
    print(f"left for the same command: {', '.join(left)}" if left else "all done")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()

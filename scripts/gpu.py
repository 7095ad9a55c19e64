"""All work that needs a GPU, in one command: the comparison on real images, then all benchmarks.

    python scripts/gpu.py --images CUB --weights RESNET50 --output OUT --minutes 9

CUB is the publisher's folder of CUB-200-2011 or a part of it; RESNET50 is a file of weights. The comparison takes ten
images of each class at 224 pixels and five methods: alpha on three folds of the training images, then five seeds. The
command stops in time. Repeat it to go on; published records (--records) count as done. The small files to keep are in
OUT/records and results/published/benchmarks. The benchmarks begin at the latest when 5/9 of the time are left.

Runs follow one another: three at a time were slower on an H100 (2,100 images/s in all, against 2,400).
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).parent
RUN = ["-m", "delta_transfer.train", "-m"]
PUBLISH = ["-m", "delta_transfer.report", "publish"]
CHOSEN = {"delta": "0.0001,0.001,0.01", "delta_noatt": "0.0001,0.001,0.01", "l2_sp": "0.01,0.1"}  # on folds


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


def compare(options: argparse.Namespace, end: float) -> bool:
    """Whether all runs of the comparison are done, by the time `end`."""
    common = [
        *("+experiment=table_quick", f"results_dir={options.output.resolve()}", f"device={options.device}"),
        *(f"dataset.root={options.images.resolve()}", f"backbone.weights={options.weights.resolve()}"),
        *("backbone=resnet50", "backbone.image_size=224", "backbone.resize=256", "schedule.batch_size=64"),
        *("schedule.eval_every=50", *options.overrides),
    ]
    on_folds = ["seed=0", "split.folds=3", "split.fold=0,1,2"]
    sweeps = [[*common, f"reg={method}", f"reg.alpha={alphas}", *on_folds] for method, alphas in CHOSEN.items()]
    sweeps.append([*common, "reg=l2,l2_fe", "seed=range(5)"])
    # A run that diverges on a fold fails, which is a result.
    if any(within(end - time.monotonic(), *RUN, *sweep) is None for sweep in sweeps):
        return False
    report = [sys.executable, "-m", "delta_transfer.report", str(options.output), "--select", "cv", "--emit-overrides"]
    lines = subprocess.run(report, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    # Only the choice is taken from these commands: paths and device are those of this machine.
    chosen = [[word for word in shlex.split(line) if word.startswith(("reg=", "reg."))] for line in lines]
    if len(chosen) < len(CHOSEN):
        return False
    return all(within(end - time.monotonic(), *RUN, *common, *words, "seed=range(5)") == 0 for words in chosen)


def unpack(published: Path, runs: Path) -> None:
    """A run folder for each record that `delta-report publish` wrote, so that delta-run finds the run done."""
    for line in (published / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        folder = runs / record["run_id"]
        folder.mkdir(parents=True, exist_ok=True)
        lines = record.pop("metrics")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        (folder / "summary.json").write_text(json.dumps(record), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--records", type=Path, help="published records of the same comparison")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--overrides", nargs="*", default=[], help="more of delta-run's, e.g. schedule.iterations=100")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if options.records:
        unpack(options.records, options.output / "runs")
    compared = compare(options, end - 60 * options.minutes * 5 / 9)
    measured = within(end - time.monotonic() - 5, SCRIPTS / "bench.py", "--device", options.device) == 0
    within(30, *PUBLISH, options.output, "--to", options.output / "records", "--records-only")
    left = [name for name, done in (("comparison", compared), ("benchmarks", measured)) if not done]
    print(f"left for the same command: {', '.join(left)}" if left else "all done")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()

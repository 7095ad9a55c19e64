"""The study of when regularised fine-tuning helps: several data sets, methods, strengths on folds, five seeds.

    python scripts/when_does_it_help.py --data DIR --weights resnet18.safetensors [--results DIR] [--only NAME,...]

Each data set is one folder of results. The script first tries every strength on two folds of the training images, goes
on by decades until the best is not at an edge, and then trains with the best on all training images with five seeds.
No test image takes part in a choice. The command resumes: finished runs are skipped, and a finished study costs a
minute. Runs of one data set are in the order of their worth, so that a study that was stopped has a table.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

SEEDS = 5
FOLDS = 2
DATASETS = {  # name: the words that name the images, below --data
    "cub50_10": "dataset=cub dataset.root={data}/cub50",
    "dtd10_10": "dataset=folder dataset.root={data}/dtd10 dataset.name=dtd10",
    "hymenoptera_10": "dataset=folder dataset.root={data}/hymenoptera dataset.name=hymenoptera",
    "caltech50_10": "dataset=caltech101 dataset.root={data}/caltech101-half dataset.train_per_class=10",
    "cifar10_10": "dataset=folder dataset.root={data}/cifar10-part dataset.name=cifar10-part",
    "dtd10_3": "dataset=folder dataset.root={data}/dtd10 dataset.name=dtd10 dataset.images_per_class=3",
    "cub50_30": "dataset=cub dataset.root={data}/cub50 dataset.images_per_class=30",
    "dtd10_30": "dataset=folder dataset.root={data}/dtd10 dataset.name=dtd10 dataset.images_per_class=30",
    "cub50_3": "dataset=cub dataset.root={data}/cub50 dataset.images_per_class=3",
}
SMALL = ("dtd10_10", "hymenoptera_10", "cifar10_10", "dtd10_3")  # 100 images and fewer: 150 iterations are 48 epochs
STRENGTHS = {"delta_noatt": (-4, -3, -2), "delta": (-4, -3, -2), "l2_sp": (-3, -2, -1)}  # decades of alpha
WEAKEST, STRONGEST = -7, 2
METHODS = ("l2", "l2_fe", "delta_noatt", "delta", "l2_sp", "stochnorm", "lp_ft")


class Study:
    """One data set's part of the study.

    name: its key in DATASETS; words: what every command of it has in common; results: its folder.
    """

    def __init__(self, name: str, words: list[str], results: Path) -> None:
        self.words = ["+experiment=when_does_it_help", *words, f"results_dir={results / name}"]
        self.runs = results / name / "runs"

    def run(self, *words: str) -> None:
        """Carries out one sweep; a run that diverges is a result, so that its exit status is not looked at."""
        command = [sys.executable, "-m", "delta_transfer.train", "-m", *self.words, *words]
        if subprocess.run(command).returncode > 128:
            sys.exit("stopped; the same command goes on")

    def on_folds(self, method: str, decade: int) -> float:
        """Mean accuracy on the images held out, in percent, with alpha = 10 ** decade; minus infinity if it fails."""
        folds = ",".join(map(str, range(FOLDS)))
        self.run(f"reg={method}", f"reg.alpha={10.0**decade:g}", f"split.folds={FOLDS}", f"split.fold={folds}")
        found = [
            record["val_top1"]
            for record in map(
                json.loads, (path.read_text() for path in self.runs.glob(f"*-{method}-s0-*/summary.json"))
            )
            if record.get("val_top1") is not None
            and record["config"]["reg"]["name"] == method
            and math.isclose(record["config"]["reg"]["alpha"], 10.0**decade)
        ]
        return sum(found) / FOLDS if len(found) == FOLDS else -math.inf

    def best_alpha(self, method: str) -> float:
        """The strength that is best on the folds; ties go to the weaker one."""
        accuracy = {decade: self.on_folds(method, decade) for decade in STRENGTHS[method]}
        while True:
            best = max(sorted(accuracy), key=accuracy.__getitem__)
            beyond = best - 1 if best == min(accuracy) else best + 1
            if beyond in accuracy or not WEAKEST <= beyond <= STRONGEST:
                print(f"{method}: alpha {10.0**best:g}", {f"{10.0**d:g}": a for d, a in sorted(accuracy.items())})
                return 10.0**best
            accuracy[beyond] = self.on_folds(method, beyond)

    def carry_out(self, methods: list[str]) -> None:
        alphas = {}
        for method in methods:
            if method in STRENGTHS:
                alphas[method] = [f"reg.alpha={self.best_alpha(method):g}"]
            self.run(f"reg={method}", *alphas.get(method, []), f"seed=range({SEEDS})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds cub50, dtd10, ...")
    parser.add_argument("--weights", required=True, help="weights of ResNet-18")
    parser.add_argument("--results", type=Path, default=Path("results/when_does_it_help"))
    parser.add_argument("--only", default=",".join(DATASETS), help="names of data sets, in order (default: all)")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, in order (default: all)")
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        words = [word.format(data=arguments.data) for word in DATASETS[name].split()]
        if name in SMALL:
            words.append("schedule.iterations=150")
        study = Study(name, [*words, f"backbone.weights={arguments.weights}"], arguments.results)
        study.carry_out(arguments.methods.split(","))


if __name__ == "__main__":
    main()

"""Common parts of the studies of this folder: strengths by decades on validation data, then the final runs."""

import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from delta_transfer.records.reading import is_number, method_of, read_all, section, seed


@dataclass(frozen=True)
class Trial:
    """The runs on which a strength is chosen."""

    words: tuple[str, ...]
    seeds: range
    runs: int  # their number
    metric: str  # of their records, measured on validation data; more is better


ON_FOLDS = Trial(("split.folds=2", "split.fold=0,1"), range(1), 2, "val_top1")


class Study:
    """One data set's part of a study.

    words: the common words of its commands. results: its folder. strengths: the first decades of alpha to try, by
    method. limits: the lowest and the highest decade. beside: further words of a method.
    """

    def __init__(
        self,
        words: Sequence[str],
        results: Path,
        trial: Trial,
        strengths: Mapping[str, tuple[int, ...]],
        limits: tuple[int, int],
        beside: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.words = [*words, f"results_dir={results}"]
        self.results, self.trial, self.strengths, self.limits = results, trial, strengths, limits
        self.beside = beside or {}
        self.chosen: dict[str, list[str]] = {}  # by method, the word of its strength

    def run(self, method: str, *words: str) -> None:
        """Carries out one sweep. A run that diverges is a result, so that the exit status is ignored."""
        of_method = [f"reg={method}", *self.beside.get(method, ())]
        command = [sys.executable, "-m", "delta_transfer.train", "-m", *self.words, *of_method, *words]
        if subprocess.run(command).returncode > 128:
            sys.exit("stopped; the same command goes on")

    def found(self, method: str, alpha: float) -> list[float]:
        """The measurements of the trial's finished runs with this strength."""
        return [
            record[self.trial.metric]
            for record in (read_all([self.results])[0] if self.results.is_dir() else [])
            if is_number(record.get(self.trial.metric))
            and seed(record) in self.trial.seeds
            and method_of(record) == method
            and math.isclose(section(record, "reg")["alpha"], alpha)
        ]

    def tried(self, method: str, decade: int) -> float:
        """The mean over the trial's runs with alpha = 10 ** decade; minus infinity if one failed."""
        alpha = 10.0**decade
        if len(self.found(method, alpha)) < self.trial.runs:
            self.run(method, f"reg.alpha={alpha:g}", *self.trial.words)
        found = self.found(method, alpha)
        return fmean(found) if len(found) == self.trial.runs else -math.inf

    def strength(self, method: str) -> list[str]:
        """The word of the best strength; [] for a method without one.

        Adds decades until the best is not at an edge, or as good as its neighbour there.
        """
        if method in self.strengths and method not in self.chosen:
            means = {decade: self.tried(method, decade) for decade in self.strengths[method]}
            while True:
                best = max(sorted(means), key=means.__getitem__)  # ties go to the weaker one
                step = -1 if best == min(means) else 1
                beyond, level = best + step, means[best] == means.get(best - step)
                if level or beyond in means or not self.limits[0] <= beyond <= self.limits[1]:
                    break
                means[beyond] = self.tried(method, beyond)
            shown = ", ".join(f"{10.0**decade:g}: {mean:.2f}" for decade, mean in sorted(means.items()))
            print(f"{self.results.name}, {method}: alpha {10.0**best:g} ({self.trial.metric} by alpha: {shown})")
            self.chosen[method] = [f"reg.alpha={10.0**best:g}"]
        return self.chosen.get(method, [])

    def final(self, method: str, seeds: int, *words: str) -> None:
        """The runs with the chosen strength, the seeds 0 to seeds - 1 and further words."""
        self.run(method, *self.strength(method), f"seed=range({seeds})", *words)

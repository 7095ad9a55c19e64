"""Is a difference more than chance? Pure functions on the cells of a comparison; SciPy does the arithmetic.

SciPy is imported where it is used, since most tables do not need it.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..records.arrays import Predictions
from ..records.metrics import ACCURACY, Metric
from .comparison import Cell, Comparison, grouped
from .record_views import Replicate, Settings

CONFIDENCE = 0.95
ERROR, POWER = 0.05, 0.8  # of one-sided tests
MOST_SEEDS = 200  # largest number of seeds that is reported
RESAMPLES = 2000  # for the bootstrap
ENOUGH_IMAGES = 6  # differing images: with 5, all on one side, the sign test's p is still 0.06
ENOUGH_ROWS = 5  # for a critical difference: with fewer, ranks can hardly differ by more than chance


@dataclass(frozen=True)
class Difference:
    """The difference of two methods, in points of a percentage, with its 95 % interval if there is enough for one."""

    mean: float
    low: float | None
    high: float | None
    n: int  # pairs: seeds, folds, or images
    kind: Metric = ACCURACY
    over: str = "seed"  # the kind of a pair

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def advice(self) -> str:
        """What to do about an interval over two pairs, which is 12.7 standard errors wide to each side; else empty."""
        if self.n != 2 or self.low is None:
            return ""
        more = " (seed='range(5)')" if self.over == "seed" else ""
        return f"Two {self.over}s give no useful interval: run at least three{more}."

    @property
    def merit(self) -> float:
        """The mean, signed so that more is better."""
        return self.kind.merit(self.mean)

    def signed(self, value: float) -> str:
        return signed(value, self.kind.digits)

    def __str__(self) -> str:
        return f"{self.without_n} ({self.n})"

    @property
    def without_n(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.signed(self.low)}, {self.signed(self.high)}]"
        return f"{self.signed(self.mean)}{ends}"

    @property
    def span(self) -> tuple[float, float, float]:
        """(low, mean, high); all are the mean if there is no interval."""
        return (self.mean if self.low is None else self.low, self.mean, self.mean if self.high is None else self.high)

    @property
    def certainty(self) -> str:
        """The interval in words, and the number of seeds or folds."""
        pairs = f"{self.n} {self.over}{'s' * (self.n != 1)}"
        if self.low is None or self.high is None:
            return pairs
        return f"95 % interval {self.signed(self.low)} to {self.signed(self.high)}, {pairs}"


def half_width(std: float, n: int) -> float:
    """Half the width of the 95 % t interval of a mean over n > 1 values with the sample standard deviation `std`."""
    from scipy import stats

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)


def signed(value: float, digits: int = 1) -> str:
    """The value with its sign. A rounded zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if set(text[1:]) <= set("0.") else text


def paired_values(ours: Cell, theirs: Cell) -> list[float]:
    """ours - theirs for each seed that both have; for runs on folds a mean over seeds for each fold."""
    both = sorted(ours.values.keys() & theirs.values.keys())
    place = 1 if over_folds(both) else 0
    by_pair: dict[int | None, list[float]] = {}
    for key in both:
        by_pair.setdefault(key[place], []).append(ours.values[key] - theirs.values[key])
    return [math.fsum(values) / len(values) for values in by_pair.values()]


def over_folds(keys: Iterable[Replicate]) -> bool:
    """Whether a pair is a fold: seeds of one fold share its test images, so that they are not separate pairs."""
    return len({fold for _, fold in keys}) > 1


def paired(ours: Cell, theirs: Cell) -> Difference | None:
    """Mean of ours - theirs over shared seeds, with a t interval of n - 1 degrees of freedom; None without any.

    Runs of one seed are pairs because all methods see the same batches. If runs were tested on several folds, a fold
    is a pair.
    """
    over = "fold" if over_folds(ours.values.keys() & theirs.values.keys()) else "seed"
    differences = paired_values(ours, theirs)
    return mean_of(differences, ours.kind, over) if differences else None


def mean_of(differences: Sequence[float], kind: Metric = ACCURACY, over: str = "seed") -> Difference:
    """The mean difference, with a t interval unless there is only one or all are equal."""
    n, mean = len(differences), math.fsum(differences) / len(differences)
    # Few images often give equal differences by chance, and an interval of width 0 would claim certainty.
    if n == 1 or math.isclose(min(differences), max(differences), abs_tol=1e-9):
        return Difference(mean, None, None, n, kind, over)
    half = half_width(statistics.stdev(differences), n)
    return Difference(mean, mean - half, mean + half, n, kind, over)


@dataclass(frozen=True)
class Equivalence:
    """Whether ours is no worse than theirs by more than a margin, and equal within it: one-sided tests at 5 %."""

    p_no_worse: float  # of the hypothesis that ours is worse by the margin or more
    p_no_better: float  # of the hypothesis that ours is better by the margin or more
    p_worse: float  # of the hypothesis that ours is not worse by more than the margin
    seeds: int | None  # seeds that show the suggested result with 80 % power; None: more than MOST_SEEDS

    @property
    def found(self) -> str:
        """equal | no worse | worse | open"""
        if max(self.p_no_worse, self.p_no_better) < ERROR:
            return "equal"
        return "no worse" if self.p_no_worse < ERROR else "worse" if self.p_worse < ERROR else "open"


def equivalence(ours: Cell, theirs: Cell, margin: float) -> Equivalence | None:
    """Two one-sided t tests of the differences paired by seed or fold (Schuirmann, 1987).

    margin: in points, or in the unit of a metric that is not a percentage. None with fewer than two shared seeds or
    without a spread. Raises ValueError for a margin that is not positive.
    """
    if margin <= 0:
        raise ValueError(f"a margin is positive, got {margin}")
    differences = [ours.kind.merit(value) for value in paired_values(ours, theirs)]
    if len(differences) < 2 or math.isclose(min(differences), max(differences), abs_tol=1e-9):
        return None
    from scipy import stats

    no_worse = stats.ttest_1samp(differences, -margin, alternative="greater")
    no_better = stats.ttest_1samp(differences, margin, alternative="less")
    mean, spread = math.fsum(differences) / len(differences), float(stats.tstd(differences))
    needed = seeds_needed(abs(mean + margin) / spread)
    return Equivalence(float(no_worse.pvalue), float(no_better.pvalue), 1 - float(no_worse.pvalue), needed)


def seeds_needed(effect: float) -> int | None:
    """The fewest pairs with which a one-sided t test at 5 % finds an effect, in standard deviations, with 80 % power.

    The power is that of the noncentral t distribution. None if it takes more than MOST_SEEDS.
    """
    from scipy import stats

    n = np.arange(2, MOST_SEEDS + 1)
    power = stats.nct.sf(stats.t.ppf(1 - ERROR, n - 1), n - 1, effect * np.sqrt(n))
    return next(iter(n[power >= POWER].tolist()), None)


def by_image(pairs: list[tuple[Predictions, Predictions]], balanced: bool = False) -> Difference:
    """Difference in accuracy, (ours, theirs) of each seed, with a bootstrap interval over the test images.

    The unit is the image: its difference is the mean over the seeds, so that it counts once for any number of networks.
    The interval takes percentiles of 2,000 resamples from a seeded generator. There is none if all differences are
    equal or fewer than ENOUGH_IMAGES of them are not 0. Raises ValueError if the images differ.
    """
    from scipy import stats

    differences = image_differences(pairs, balanced)
    mean = float(differences.mean())
    if np.ptp(differences) == 0 or np.count_nonzero(differences) < ENOUGH_IMAGES:
        return Difference(mean, None, None, len(differences))
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // len(differences)),  # numbers in memory at a time
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Difference(mean, float(interval.low), float(interval.high), len(differences))


def image_differences(pairs: list[tuple[Predictions, Predictions]], balanced: bool = False) -> np.ndarray:
    """(N,) ours - theirs of each image, in points and as a mean over the seeds. Raises ValueError if images differ.

    balanced: images are weighted so that each class weighs the same, and the mean is that of balanced accuracies.
    """
    first = pairs[0][0]
    for one in (one for pair in pairs for one in pair):
        if not (np.array_equal(one.index, first.index) and np.array_equal(one.labels, first.labels)):
            raise ValueError("predictions of different test images")
    each = [ours.correct.astype(float) - theirs.correct for ours, theirs in pairs]
    found: np.ndarray = np.mean(each, axis=0) * 100
    if balanced:
        counts = np.bincount(first.labels)
        found = found * (len(found) / np.count_nonzero(counts) / counts[first.labels])
    return found


def mcnemar(ours: Predictions, theirs: Predictions) -> tuple[int, int, float]:
    """Numbers of images that only ours and only theirs gets right, and McNemar's exact two-sided p of the counts."""
    from scipy import stats

    only_ours = int((ours.correct & ~theirs.correct).sum())
    only_theirs = int((theirs.correct & ~ours.correct).sum())
    if not only_ours + only_theirs:
        return 0, 0, 1.0
    return only_ours, only_theirs, float(stats.binomtest(only_ours, only_ours + only_theirs).pvalue)


# ---- one setting of each method --------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """The methods, each with one setting, that can be compared: of one data set, backbone and setting outside reg."""

    dataset: str
    backbone: str
    shared: Settings
    cells: dict[str, Cell]
    several: list[str]  # methods with several settings, left out because none may be picked by its test accuracy

    def differences(self, baseline: str) -> dict[str, Difference]:
        """The difference of each method to the baseline, if they have a pair."""
        base = self.cells.get(baseline)
        return {m: d for m, cell in self.cells.items() if base and m != baseline and (d := paired(cell, base))}


def contests(comparison: Comparison) -> list[Contest]:
    made = []
    for place, results in comparison.places:
        by_method = grouped(results, lambda one: one.method)
        single = {method: found[0].cell for method, found in by_method if len(found) == 1}
        made.append(Contest(*place, single, [method for method, found in by_method if len(found) > 1]))
    return made


def winner(contest: Contest) -> str | None:
    """The method that is better than every other one by a paired difference whose interval excludes zero.

    There is no correction for the number of comparisons. None if a method has several settings, since the best of them
    would be selected on test data.
    """
    if contest.several or len(contest.cells) < 2:
        return None
    best = max(contest.cells, key=lambda method: contest.cells[method].merit)
    found = [paired(contest.cells[best], cell) for method, cell in contest.cells.items() if method != best]
    return best if all(one and one.excludes_zero and one.merit > 0 for one in found) else None


@dataclass(frozen=True)
class Standing:
    """The methods of a contest relative to a baseline. An interval that excludes zero is more than noise."""

    best: str  # the best mean
    wins: bool  # best is ahead of every other method by more than noise
    differences: dict[str, Difference]  # to the baseline, by method
    ahead: list[str]  # of the baseline, by more than noise
    behind: list[str]

    @property
    def has_intervals(self) -> bool:
        return any(one.low is not None for one in self.differences.values())


def standing(contest: Contest, baseline: str) -> Standing:
    """The standing of a contest. Raises ValueError for a contest without methods."""
    best, found = max(contest.cells, key=lambda method: contest.cells[method].merit), contest.differences(baseline)
    ahead = [method for method, one in found.items() if one.excludes_zero and one.merit > 0]
    behind = [method for method, one in found.items() if one.excludes_zero and one.merit < 0]
    return Standing(best, winner(contest) == best, found, ahead, behind)


# ---- over data sets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Mean rank of each method over the rows that have all of them; rank 1 is the best."""

    mean: dict[str, float]
    rows: int
    friedman_p: float | None  # for the hypothesis that all methods are alike
    critical_difference: float | None  # mean ranks further apart than this differ (Nemenyi); None with too few rows


def ranks(scores: list[dict[str, float]]) -> Ranks | None:
    """Mean ranks over `scores`, by method for each row, more is better; None unless two rows share two methods.

    Friedman's test and Nemenyi's critical difference q * sqrt(k (k + 1) / (6 N)) at 95 %, q the studentized range with
    infinite degrees of freedom over sqrt(2) (Demsar, JMLR 2006), rows taken as independent.
    """
    methods = [method for method in (scores[0] if scores else {}) if all(method in row for row in scores)]
    n, k = len(scores), len(methods)
    if n < 2 or k < 2:
        return None
    from scipy import stats

    ranked = [stats.rankdata([-row[method] for method in methods]) for row in scores]
    mean = {method: float(sum(row[i] for row in ranked)) / n for i, method in enumerate(methods)}
    if n < ENOUGH_ROWS or k < 3:
        return Ranks(mean, n, None, None)
    p = float(stats.friedmanchisquare(*([row[method] for row in scores] for method in methods)).pvalue)
    q = float(stats.studentized_range.ppf(CONFIDENCE, k, math.inf)) / math.sqrt(2)
    return Ranks(mean, n, p, q * math.sqrt(k * (k + 1) / (6 * n)))

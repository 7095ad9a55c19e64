"""Cells of one method along one setting, and the label curve: accuracy against training images per class, fitted."""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

from ..common.tables import MISSING, Entry, Table, table_of
from ..records.reading import is_number
from .comparison import Cell, Comparison, grouped
from .record_views import Settings, reg_settings, settings
from .statistics import Difference, mean_of, signed

LABELS = "n_train"  # stands for the mean number of training images per class
DRAWN = ("dataset.images_per_class", "dataset.sample_rate")  # how many training images are drawn
LENGTH = ("schedule.iterations", "schedule.batch_size")  # depend on the number of images with schedule=own
ENOUGH_SIZES = 3  # two sizes fit any power law


@dataclass(frozen=True)
class Swept:
    """Cells of one method that differ in only one setting."""

    method: str
    settings: dict[str, object]  # all others, inside and outside reg
    cells: dict[float, Cell]  # by value of the setting, ascending


def settings_of(cell: Cell, metric: str) -> dict[str, object]:
    """All settings of a cell, in which its runs agree.

    The fingerprint of the data set is among them. It is taken before training images are drawn, so that it does not
    depend on dataset.sample_rate and dataset.images_per_class, and different data sets stay apart.
    """
    return settings(cell.runs[0], metric) | reg_settings(cell.runs[0])


def value_of(cell: Cell, key: str, metric: str) -> object:
    """A setting of a cell; for LABELS its mean number of training images per class; "absent" if it has none."""
    if key != LABELS:
        return settings_of(cell, metric).get(key, "absent")
    n, classes = (cell.runs[0].get(name) for name in ("n_train", "num_classes"))
    return n / classes if n and classes and is_number(n) and is_number(classes) else "absent"


def swept(method: str, cells: list[Cell], key: str, metric: str) -> list[Swept]:
    """The cells in lines along `key`, without lines of a single value.

    Lengths that follow from the number of training images make no separate lines.
    """
    made: list[Swept] = []
    for keys in ((*DRAWN, *LENGTH), DRAWN) if key == LABELS else ((key,),):
        lines: dict[frozenset[tuple[str, object]], dict[float, Cell]] = defaultdict(dict)
        for cell in cells:
            value = value_of(cell, key, metric)
            if is_number(value) and value >= 0:
                others = {name: one for name, one in settings_of(cell, metric).items() if name not in keys}
                lines[frozenset(others.items())].setdefault(value, cell)
        made = [Swept(method, dict(o), dict(sorted(found.items()))) for o, found in lines.items() if len(found) > 1]
        if sum(map(len, lines.values())) == len(cells):  # no two cells in one place
            break
    return made


def varying(lines: list[Swept]) -> list[Settings]:
    """For each line of one method, the settings in which it differs from the others."""
    keys = sorted({key for line in lines for key in line.settings})
    differing = [key for key in keys if len({line.settings.get(key, "absent") for line in lines}) > 1]
    return [tuple((key, line.settings.get(key, "absent")) for key in differing) for line in lines]


# ---- the label curve -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelCurve:
    """The accuracy of a method, in percent, by the mean number of training images per class."""

    line: Swept

    @property
    def largest(self) -> float:
        return max(self.line.cells)

    @cached_property
    def fits(self) -> np.ndarray:
        """(seeds, 2): log a and b of accuracy = 100 - a n^-b, fitted for each seed that has every size (least squares).

        If no seed has every size, the means are fitted. The form is that of Hestness et al. (2017), without their
        constant.
        """
        from scipy.optimize import least_squares

        cells = self.line.cells
        shared = sorted(set.intersection(*(set(cell.values) for cell in cells.values())))
        each = [[cell.values[key] for cell in cells.values()] for key in shared]
        each = each or [[cell.mean for cell in cells.values()]]
        n = np.array(list(cells))

        def misfit(p: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
            return 100 - np.exp(p[0]) * n ** -p[1] - accuracies

        found = []
        for accuracies in np.array(each):
            slope, start = np.polyfit(np.log(n), np.log(np.maximum(100 - accuracies, 0.1)), 1)
            found.append(least_squares(misfit, (start, -slope), args=(accuracies,)).x)
        return np.array(found)

    def errors(self, n: float) -> np.ndarray:
        """(seeds,) 100 - the fitted accuracies at n images per class."""
        return np.exp(self.fits[:, 0] - self.fits[:, 1] * math.log(n))

    @property
    def doubling(self) -> Difference:
        """The gain from twice the largest number of labels by the fit, with its t interval over seeds."""
        return mean_of((self.errors(self.largest) - self.errors(2 * self.largest)).tolist())

    @property
    def misfit(self) -> float:
        """The root mean square distance of the fitted curve from the means, in points."""
        return math.sqrt(fmean((100 - self.errors(n).mean() - cell.mean) ** 2 for n, cell in self.line.cells.items()))


def label_curves(comparison: Comparison) -> list[Table]:
    """A table for each data set and backbone with enough sizes: accuracy by size, and the gain from twice as many."""
    made: list[Table] = []
    if not comparison.kind.percent:
        return made
    for (dataset, backbone), rows in grouped(comparison.rows, lambda row: (row.dataset, row.backbone)):
        lines: list[tuple[LabelCurve, Settings]] = []
        for method in comparison.methods:
            cells = [row.cells[method] for row in rows if method in row.cells]
            own = [one for one in swept(method, cells, LABELS, comparison.metric) if len(one.cells) >= ENOUGH_SIZES]
            lines += zip(map(LabelCurve, own), varying(own), strict=True)
        if lines:
            made.append(label_table(f"{comparison.dataset_title(dataset)}, {backbone}", lines, comparison))
    return made


def label_table(place: str, lines: list[tuple[LabelCurve, Settings]], comparison: Comparison) -> Table:
    sizes = sorted({n for curve, _ in lines for n in curve.line.cells})
    rows: list[dict[str, str | Entry]] = []
    for curve, reg in lines:
        cells = {f"{n:.3g} per class": curve.line.cells.get(n) for n in sizes}
        rows.append(
            {"method": comparison.label(curve.line.method, reg)}
            | {size: Entry(str(cell), cell.mean) if cell else MISSING for size, cell in cells.items()}
            | {"twice as many are worth": Entry(curve.doubling.without_n, curve.doubling.mean)}
        )
    curve, _ = max(lines, key=lambda line: (line[0].line.method == "l2", line[0].largest))
    worst = max(curve.misfit for curve, _ in lines)
    notes = [
        "Worth of twice as many: from the largest number on, by accuracy = 100 - a · n^-b fitted for each seed; mean "
        "and 95 % t interval in points. It was not measured",
        f"The fitted curves miss the means by up to {worst:.1f} points (root mean square over the sizes)",
    ]
    title = f"{place}: how many labels? {comparison.measured} by training images per class"
    return table_of(title, rows, 1, notes=notes, verdict=worth(curve, comparison.display(curve.line.method)))


def worth(curve: LabelCurve, name: str) -> str:
    gain, n = curve.doubling, curve.largest
    points = signed(gain.mean).removeprefix("+")
    return (
        f"Doubling your labels, from {n:.3g} to {2 * n:.3g} images per class, is worth about {points} points "
        f"with {name} ({gain.certainty})."
    )

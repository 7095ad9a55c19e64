"""Writes the figures of delta-report."""

from collections import Counter
from pathlib import Path

from ..common.console import QUIET, Display, Warn
from ..common.errors import UserError
from ..records.files import make_output_folder, write_figure
from .comparison import Comparison
from .curve_figures import learning_curves, matching_figures
from .drawing import Style, our_look
from .interval_figures import SWEEPS, against_setting, differences, intervals, roc_curves
from .logs import curves_of


def write_figures(
    comparison: Comparison, folder: Path, warn: Warn, baseline: str | None = None, style: Style | None = None
) -> list[Path]:
    """Writes all figures that the records have data for, each as PNG and PDF. Returns the paths.

    The first figures are the differences to the method `baseline`, on which every conclusion rests.

    warn: called with a line about each figure that cannot be drawn. Raises UserError if `folder` cannot be written to.
    """
    with our_look(style):
        made = differences(comparison, baseline) if baseline else []
        groups = curves_of(comparison, warn)
        made += learning_curves(comparison, groups, warn)
        for sweep in SWEEPS:
            made += against_setting(comparison, sweep, warn)
        made += intervals(comparison)
        if comparison.metric == "test_pair_accuracy":
            made += roc_curves(comparison, warn)
        made += matching_figures(comparison, groups)

        count, number = Counter(stem for stem, _ in made), Counter[str]()
        paths: list[Path] = []
        try:
            make_output_folder(folder)
            display = Display(str(folder), len(made), "figure", quiet_seconds=QUIET)
            for done, (stem, figure) in enumerate(made):
                display.update(done)
                number[stem] += 1
                name = stem if count[stem] == 1 else f"{stem}-{number[stem]}"
                paths += write_figure(figure, folder / name)
        except OSError as error:
            raise UserError(f"Figures cannot be written to {folder}: {error}. Name another folder.") from None
    return paths

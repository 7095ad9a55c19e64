"""The common parts of all figures of delta-report: looks, the sheet with title, legend and caption, words.

Figures have the size of print: the width of a column (3.4 in), or of a page (6.8 in) with several panels or long names,
and letters of 8 pt. They do not use pyplot, so that there is no state and no window. The same records give the same
files, byte for byte, with one version of matplotlib.
"""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from ..common.style import style_of
from .comparison import Cell
from .statistics import half_width

Named = tuple[str, Figure]  # stem of the file name, and figure; figures of one name are numbered when they are written

COLUMN, PAGE = 3.4, 6.8  # inches
INTERVAL = "95\N{NO-BREAK SPACE}% interval"  # of every mean in every figure: Student's t over runs
LETTER, LINE = 0.062, 0.15  # inches: mean width of a letter of 8 pt, height of a line
LONG = 44  # letters: a legend that needs the width of a page
MOST = 6  # lines of one method in one figure
FILLS = ["full", "none", "left", "top", "right", "bottom"]  # fill styles of markers, for the lines of one method

LOOK: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "text.parse_math": False,  # a name with $ is not a formula
    "pdf.fonttype": 42,  # letters stay letters
}


# The letters of most papers; matplotlib brings them.
PAPER = {"font.family": "STIXGeneral", "mathtext.fontset": "stix"}


@dataclass(frozen=True)
class Style:
    paper: bool = False  # serif letters, and every figure as wide as a column
    caption: bool = True  # title and caption


SCREEN = Style()
_style = ContextVar("style", default=SCREEN)


@contextmanager
def our_look(style: Style | None = None) -> Iterator[None]:
    """In this context matplotlib's defaults and LOOK replace the user's own settings.

    style: for all figures drawn in the context; None: the caller's style.
    """
    token = _style.set(style or _style.get())
    try:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(LOOK | (PAPER if _style.get().paper else {}))
            yield
    finally:
        _style.reset(token)


def wide() -> float:
    """The width in inches of a figure that needs room: a page, or a column in the style of papers."""
    return COLUMN if _style.get().paper else PAGE


def sheet(width: float, height: float, title: str, caption: str, handles: list[Line2D]) -> Figure:
    """A figure with room for panels of `height` inches: the title above them, legend and caption below."""
    line = LINE * (1.3 if _style.get().paper else 1)  # the lines of its letters are further apart
    if not _style.get().caption:
        title = caption = ""
    title_lines = wrap(title, int(width / LETTER / 1.12))
    caption_lines = wrap(caption, int(width / LETTER) - 2)
    for handle in handles:
        handle.set_label("\n".join(wrap(str(handle.get_label()), int((width - 0.9) / LETTER))))
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = max(1, min(len(handles), int(width / (0.5 + longest * LETTER))))
    rows = -(-len(handles) // columns) + sum(str(handle.get_label()).count("\n") for handle in handles)

    above = 0.1 + 1.1 * line * len(title_lines)
    legend = 0.04 + line * rows if rows else 0
    below = legend + 0.08 + line * len(caption_lines)
    total = above + height + below
    layout = ConstrainedLayoutEngine(rect=(0, below / total, 1, height / total))
    figure = Figure(figsize=(width, total), layout=layout)
    figure.text(0.5, 1 - 0.06 / total, "\n".join(title_lines), ha="center", va="top", fontsize=9)
    figure.text(0.08 / width, 0.06 / total, "\n".join(caption_lines), va="bottom")
    if handles:
        figure.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, below / total),
            ncols=columns,
            borderaxespad=0,
            borderpad=0.2,
            labelspacing=0.25,
            columnspacing=1.2,
            handlelength=3,
        )
    return figure


def side_labels(texts: Iterable[str]) -> tuple[list[str], float]:
    """The labels beside the lines of a figure, wrapped, and the width in inches that it needs with them."""
    labels = ["\n".join(wrap(text, 24 if _style.get().paper else 50)) for text in texts]
    return labels, wide() if max(map(len, labels)) > 24 else COLUMN


def look(method: str, methods: list[str], i: int, count: int) -> dict[str, Any]:
    """Keywords of line i of `count` of one method: its colour, paler with i, its line style, a marker filled by i."""
    style = style_of(method, methods)
    paler = 0.55 * i / max(1, count - 1)
    colour = tuple(part + paler * (1 - part) for part in to_rgb(style.colour))
    return {"color": colour, "linestyle": style.line, "marker": style.marker, "fillstyle": FILLS[i]}


def averages(counts: list[int], over: str, mark: str) -> str:
    """Words of a caption about means over `counts` runs and about the `mark` that shows their interval."""
    low, high = min(counts), max(counts)
    if high == 1:
        return f"Single runs (n = 1): no {mark}."
    single = "; none for n = 1" if low == 1 else ""
    return f"Mean over {over}; {mark}: its 95 % t interval, n = {low if low == high else f'{low} to {high}'}{single}."


def half_of(cell: Cell) -> float:
    """Half the width of the interval of a cell's mean; NaN for a single run."""
    return math.nan if cell.std is None else half_width(cell.std, cell.n)


def with_interval(label: str, counts: list[int]) -> str:
    """The label of an axis of means over `counts` runs."""
    return f"{label}, {INTERVAL}" if max(counts) > 1 else label


def stem_of(*parts: str) -> str:
    return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)

"""Small charts as SVG, for the page: lines with bands, bars, and maps of numbers.

Ink has the colour of the text around it. page.css turns deep colours over in dark mode. A <title> shows under the
mouse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from .logs import DECADES, limits

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 8, 36  # margins, in units of the drawing
DASHES = {"-": "", "--": "8 4", "-.": "8 3 2 3", ":": "2 3"}  # by matplotlib's name of a line style


@dataclass(frozen=True)
class Line:
    key: int  # place in the legend: a click there hides the line
    title: str
    look: str  # attributes of its strokes
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None  # half the height of the band at each point


@dataclass(frozen=True)
class Axis:
    """From values to units of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, values: "np.ndarray | Sequence[float]") -> np.ndarray:
        low, high, found = (np.log10(v) if self.log else np.asarray(v) for v in (self.low, self.high, values))
        return np.round(self.start + (self.end - self.start) * (found - low) / ((high - low) or 1.0), 1)

    def ticks(self) -> list[tuple[str, float]]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        locator = LogLocator() if self.log else MaxNLocator(5)
        found = [v for v in locator.tick_values(self.low, self.high) if self.low <= v <= self.high]
        return [(f"{v:g}", float(at)) for v, at in zip(found, self.at(found), strict=True)]


def painted(colour: str) -> str:
    """The attributes of something in a colour "#rrggbb"; a deep one has a class, since dark paper would hide it."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    deep = ' class="deep"' if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else ""
    return f'stroke="{colour}" fill="{colour}"{deep}'


def attributes(line: str, opacity: float = 1.0) -> str:
    """The attributes of a stroke; `line`: matplotlib's name of its style."""
    dashes = f' stroke-dasharray="{DASHES[line]}"' if DASHES[line] else ""
    return dashes + (f' opacity="{opacity:g}"' if opacity < 1 else "")


def drawing(parts: list[str], title: str, height: float = HEIGHT) -> str:
    label = escape(title)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def grid(x: Axis, y: Axis, x_title: str) -> list[str]:
    parts = [f'<path class="grid" d="M{LEFT} {at:g}H{WIDTH - RIGHT}"/>' for _, at in y.ticks()]
    parts += [text(LEFT - 5, at + 4, words, "end") for words, at in y.ticks()]
    parts += [text(at, HEIGHT - BOTTOM + 15, words) for words, at in x.ticks()]
    return [*parts, text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_title)]


def axes(x: tuple[float, float], y: tuple[float, float], log: bool = False) -> tuple[Axis, Axis]:
    return Axis(*x, LEFT, WIDTH - RIGHT), Axis(*y, HEIGHT - BOTTOM, TOP, log)


def lines_chart(title: str, x_title: str, lines: list[Line]) -> str:
    steps = [step for line in lines for step in (line.x[0], line.x[-1])]
    values = np.concatenate([line.y for line in lines])
    lowest, highest = float(values.min()), float(values.max())
    log, largest = lowest > 0 and highest >= DECADES * lowest, 100 if "(%)" in title else math.inf
    ends = (lowest / 1.2, highest * 1.2) if log else limits([(line.y, line.spread) for line in lines], largest)
    x, y = axes((min(steps), max(steps)), ends, log)
    parts = grid(x, y, x_title)
    for line in lines:
        across, mean = x.at(line.x), np.asarray(line.y)
        parts.append(f'<g data-key="{line.key}" {painted(line.colour)}{line.look}>')
        parts.append(f"<title>{escape(line.title)}</title>")
        if line.spread is not None:  # a band may leave the chart
            edges = [y.at(np.clip(mean + sign * np.asarray(line.spread), *ends)) for sign in (1, -1)]
            outline = [*zip(across, edges[0], strict=True), *zip(across[::-1], edges[1][::-1], strict=True)]
            parts.append(f'<polygon class="band" points="{points(outline)}"/>')
        at = list(zip(across, y.at(mean), strict=True))
        parts.append(f'<polyline points="{points(at)}"/>')
        if len(at) <= 20:
            parts += [f'<circle cx="{a:g}" cy="{b:g}" r="2.2"/>' for a, b in at]
        parts.append("</g>")
    return drawing(parts, title)


def points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in pairs)


def bars_chart(title: str, x_title: str, edges: np.ndarray, counts: np.ndarray, colour: str, reference: float) -> str:
    """A histogram with a dashed line at `reference`."""
    ends = min(edges[0], reference), max(edges[-1], reference)
    x, y = axes(ends, (0, float(counts.max()) * 1.05))
    at, tops = x.at(edges), y.at(counts)
    parts = grid(x, y, x_title)
    for i, count in enumerate(counts.tolist()):
        if count:
            size = f'x="{at[i]:g}" y="{tops[i]:g}" width="{at[i + 1] - at[i]:.1f}" height="{y.start - tops[i]:.1f}"'
            words = f"{edges[i]:.3g} to {edges[i + 1]:.3g}: {count}"
            parts.append(f"<rect {size} {painted(colour)}><title>{words}</title></rect>")
    return drawing([*parts, f'<path class="reference" d="M{x.at([reference])[0]:g} {TOP}V{HEIGHT - BOTTOM}"/>'], title)


def numbers_map(title: str, rows: list[str], columns: list[str], values: np.ndarray, most: float) -> str:
    """A cell for each row and column, empty for NaN; `most`: the value of the strongest colour."""
    left, wide, high = 80, (WIDTH - 80 - RIGHT) / len(columns), 26
    parts = []
    for j, name in enumerate(columns):
        parts.append(text(left + (j + 0.5) * wide, 12, shortened(name, wide)))
    for i, name in enumerate(rows):
        parts.append(text(left - 5, 36 + i * high, shortened(name, left), "end"))
        for j, value in enumerate(values[i]):
            if not np.isnan(value):
                part = min(1.0, value / most)
                size = f'x="{left + j * wide:.1f}" y="{18 + i * high}" width="{wide - 1:.1f}" height="{high - 1}"'
                label = f"<title>{escape(name)} > {escape(columns[j])}: {value:.4g}</title>"
                parts.append(f'<rect {size} fill="#0072b2" fill-opacity="{0.7 * part:.2f}">{label}</rect>')
                parts.append(text(left + (j + 0.5) * wide, 36 + i * high, f"{value:.2f}"))
    return drawing(parts, title, 20 + high * len(rows))


def shortened(name: str, room: float) -> str:
    most = max(3, int(room / 6))
    return name if len(name) <= most else f"{name[: most - 1]}…"

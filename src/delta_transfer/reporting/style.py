"""How methods look in every figure and page: fixed colours, told apart in grey by line and marker too."""

from dataclasses import dataclass

from .comparison import METHODS


@dataclass(frozen=True)
class Style:
    colour: str  # "#rrggbb"
    line: str  # matplotlib's; plotly's names are in DASHES
    marker: str


# Okabe and Ito's palette, safe for colour-blind readers, from dark to light in the order of METHODS.
STYLES = dict(
    zip(
        METHODS,
        [
            Style("#000000", "-", "o"),
            Style("#7f7f7f", ":", "s"),
            Style("#0072b2", "-.", "^"),
            Style("#e69f00", "--", "D"),
            Style("#d55e00", "-", "v"),
        ],
        strict=True,
    )
)
OTHERS = [Style("#009e73", "--", "P"), Style("#cc79a7", "-.", "X"), Style("#56b4e9", ":", "*")]

DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}


def style_of(method: str, methods: list[str]) -> Style:
    """Of a method by its config name; `methods`: all in the figure, which decides for those without a fixed style."""
    unknown = [name for name in methods if name not in STYLES]
    return STYLES.get(method) or OTHERS[unknown.index(method) % len(OTHERS)]

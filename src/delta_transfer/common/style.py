"""How methods look in every figure and page: fixed colours, told apart in grey by line and marker too."""

from dataclasses import dataclass

from ..reporting.comparison import METHODS


@dataclass(frozen=True)
class Style:
    colour: str  # "#rrggbb"
    line: str  # matplotlib's; plotly's names are in DASHES
    marker: str


# In the order of METHODS, safe for colour-blind readers: Okabe and Ito's palette for the papers' methods, Tol's
# contrasts for later ones, his muted ones for those whose target begins with random weights. Few are in one figure.
STYLES = dict(
    zip(
        METHODS,
        [
            Style("#000000", "-", "o"),
            Style("#7f7f7f", ":", "s"),
            Style("#0072b2", "-.", "^"),
            Style("#e69f00", "--", "D"),
            Style("#d55e00", "-", "v"),
            Style("#009e73", "--", "P"),
            Style("#56b4e9", ":", "*"),
            Style("#cc79a7", "-.", "X"),
            Style("#004488", ":", "<"),
            Style("#997700", "-", "h"),
            Style("#994455", "-.", "p"),
            Style("#6699cc", "--", "d"),
            Style("#eecc66", "-", ">"),
            Style("#ee99aa", ":", "H"),
            Style("#225522", "--", "8"),
            Style("#7f7f7f", "-", "s"),
            Style("#88ccee", "--", "<"),
            Style("#ddcc77", "-.", "D"),
            Style("#44aa99", "--", "X"),
            Style("#117733", ":", "^"),
            Style("#aa4499", "-.", "P"),
            Style("#cc6677", "--", "o"),
            Style("#332288", "-", "*"),
        ],
        strict=True,
    )
)
OTHERS = [Style("#999933", "--", "p"), Style("#882255", "-.", "h"), Style("#661100", ":", "d")]  # Tol's

DASHES = {"-": "solid", "--": "dash", "-.": "dashdot", ":": "dot"}


def style_of(method: str, methods: list[str]) -> Style:
    """Of a method by its config name; `methods`: all in the figure, which decides for those without a fixed style."""
    unknown = [name for name in methods if name not in STYLES]
    return STYLES.get(method) or OTHERS[unknown.index(method) % len(OTHERS)]

"""The look of methods in every figure and page: fixed colours; lines and markers differ in grey, too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    colour: str  # "#rrggbb"
    line: str  # matplotlib's
    marker: str


# By the method's name, safe for colour-blind readers: Okabe and Ito's palette for the papers' methods, Tol's contrasts
# for later ones, his muted ones for those whose target begins with random weights. Tables have their columns in this
# order too. Another method needs no entry: it takes one of OTHERS, and its column comes after these.
STYLES = {
    "l2": Style("#000000", "-", "o"),
    "l2_fe": Style("#7f7f7f", ":", "s"),
    "l2_sp": Style("#0072b2", "-.", "^"),
    "delta_noatt": Style("#e69f00", "--", "D"),
    "delta": Style("#d55e00", "-", "v"),
    "afa": Style("#009e73", "--", "P"),
    "afa_spatial": Style("#56b4e9", ":", "*"),
    "afa_channel": Style("#cc79a7", "-.", "X"),
    "l2_sp_fisher": Style("#004488", ":", "<"),
    "bss": Style("#997700", "-", "h"),
    "stochnorm": Style("#994455", "-.", "p"),
    "co_tuning": Style("#6699cc", "--", "d"),
    "bi_tuning": Style("#eecc66", "-", ">"),
    "rifle": Style("#ee99aa", ":", "H"),
    "lp_ft": Style("#225522", "--", "8"),
    "ldifs": Style("#999933", "-.", "v"),
    "spd": Style("#661100", "-", "p"),
    "lora": Style("#882255", "--", "h"),
    "bitfit": Style("#661100", ":", "s"),
    "ln_tune": Style("#999933", "--", "d"),
    "scratch": Style("#7f7f7f", "-", "s"),
    "lwf": Style("#88ccee", "--", "<"),
    "at": Style("#ddcc77", "-.", "D"),
    "lwf_at": Style("#44aa99", "--", "X"),
    "fm": Style("#117733", ":", "^"),
    "lwf_fm": Style("#aa4499", "-.", "P"),
    "l2t_w": Style("#cc6677", "--", "o"),
    "l2t_ww": Style("#332288", "-", "*"),
}
OTHERS = [Style("#999933", "--", "p"), Style("#882255", "-.", "h"), Style("#661100", ":", "d")]  # Tol's


def style_of(method: str, methods: list[str]) -> Style:
    """The style of a method, by its name. methods: all in the figure, among which OTHERS are shared."""
    unknown = [name for name in methods if name not in STYLES]
    return STYLES.get(method) or OTHERS[unknown.index(method) % len(OTHERS)]


def method_order(method: str) -> tuple[int, str]:
    """Key that sorts methods: those of STYLES in that order, then others by name."""
    known = list(STYLES)
    return (known.index(method), "") if method in STYLES else (len(known), method)

"""A comparison as text: rich, Markdown, LaTeX (booktabs) or CSV."""

import csv
import io

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from delta_transfer.reporting.comparison import Cell, Comparison, display, show

MISSING = "–"


def cell_text(cell: Cell | None) -> str:
    return MISSING if cell is None else str(cell)


def grid(comparison: Comparison) -> tuple[list[str], list[list[str]], int]:
    """Header, rows, and how many columns at the left are names (the others are numbers)."""
    with_settings = any(row.settings for row in comparison.rows)
    names = ["dataset", "backbone", "settings"] if with_settings else ["dataset", "backbone"]
    header = names + [display(method) for method in comparison.methods]
    rows = [
        [row.dataset, row.backbone, row.settings][: len(names)]
        + [cell_text(row.cells.get(method)) for method in comparison.methods]
        for row in comparison.rows
    ]
    return header, rows, len(names)


def as_rich(comparison: Comparison) -> Group:
    header, rows, n_names = grid(comparison)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    # Terminals are narrow: the names share one column, with the settings below them, one per line. If that is
    # not enough, the counts wrap to a second line, while "57.4 ± 1.2" stays together.
    table.add_column("dataset, backbone", no_wrap=True)
    for i, title in enumerate(header[n_names:], n_names):
        longest = max(len(row[i].split(" (")[0]) for row in rows)
        table.add_column(Text(title), justify="right", min_width=longest)
    for row, line in zip(comparison.rows, rows, strict=True):
        settings = [show((pair,)) for pair in row.shared + row.reg]
        name = "\n  ".join([f"{row.dataset}, {row.backbone}", *settings])
        table.add_row(*map(Text, [name, *line[n_names:]]))  # Text: a name with [brackets] is not markup
    title = Text(comparison.title, style="bold")
    chosen = [Text(line) for line in comparison.chosen]
    notes = [Text(note, style="dim") for note in comparison.notes]
    return Group(title, Text(), table, Text(), *chosen, *notes)


def as_markdown(comparison: Comparison) -> str:
    header, rows, n_names = grid(comparison)
    lines = [[text.replace("|", r"\|") for text in line] for line in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(line: list[str]) -> str:
        names = [text.ljust(w) for text, w in zip(line, widths, strict=True)][:n_names]
        numbers = [text.rjust(w) for text, w in zip(line, widths, strict=True)][n_names:]
        return f"| {' | '.join(names + numbers)} |"

    rule = ["-" * w if i < n_names else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    table = [aligned(lines[0]), aligned(rule), *map(aligned, lines[1:])]
    notes = [f"- {note}" for note in comparison.chosen + comparison.notes]
    return "\n".join([f"**{comparison.title}**", "", *table, "", *notes]).rstrip("\n") + "\n"


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    MISSING: "--",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def latex_text(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def as_latex(comparison: Comparison) -> str:
    header, rows, n_names = grid(comparison)
    head, *body = [" & ".join(map(latex_text, line)) + r" \\" for line in [header, *rows]]
    lines = [
        *(f"% {note}" for note in comparison.chosen + comparison.notes),
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{latex_text(comparison.title)}}}",
        rf"\begin{{tabular}}{{{'l' * n_names}{'r' * len(comparison.methods)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Long form, for other programs: one line per cell, methods by their config names."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["dataset", "backbone", "settings", "method", "mean", "std", "n"])
    for row in comparison.rows:
        for method in comparison.methods:
            if cell := row.cells.get(method):
                names = [row.dataset, row.backbone, row.settings, method]
                std = "" if cell.std is None else round(cell.std, 4)
                out.writerow([*names, round(cell.mean, 4), std, cell.n])
    return text.getvalue()

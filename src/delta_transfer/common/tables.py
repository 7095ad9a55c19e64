"""Tables as text for the terminal (rich), Markdown and LaTeX (booktabs)."""

import re
from dataclasses import dataclass, field
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

MISSING = "–"


@dataclass(frozen=True)
class Entry:
    text: str
    value: float | None = None  # the number to sort by; None: sorted by its text
    bold: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[Entry]]  # each as long as the header
    names: int  # so many columns at the left are names, the others numbers
    remarks: list[str] = field(default_factory=list)  # under the table, one line each
    notes: list[str] = field(default_factory=list)  # the small print: settings, hardware, how it was computed

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"{self.title}: every row needs {len(self.header)} entries")


def entries(*cells: "str | Entry") -> list[Entry]:
    return [cell if isinstance(cell, Entry) else Entry(cell) for cell in cells]


UNCUT = 100_000  # columns, so that tables are not wrapped in a pipe or a file


def on_screen(tables: list[Table], terminal: bool) -> str:
    """The tables as rich shows them: as wide as the terminal and with styles, or as plain text without a width."""
    console = Console(file=None if terminal else StringIO(), highlight=False, width=None if terminal else UNCUT)
    with console.capture() as captured:
        console.print(as_rich(tables))
    return captured.get()


def as_rich(tables: list[Table]) -> Group:
    parts: list[RenderableType] = []
    for table in tables:
        parts += [Text(), *rich_parts(table)] if parts else rich_parts(table)
    return Group(*parts)


def rich_parts(table: Table) -> list[RenderableType]:
    grid = RichTable(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    # Terminals are narrow: the names share one column, from the third on one per line. If that is not enough, counts
    # and settings wrap, while "57.4 ± 1.2" stays together.
    grid.add_column(Text(", ".join(table.header[: min(2, table.names)])), no_wrap=True)
    for i, title in enumerate(table.header[table.names :], table.names):
        longest = max((len(row[i].text.split(" (")[0]) for row in table.rows), default=0)
        grid.add_column(Text(title), justify="right", min_width=longest)
    for row in table.rows:
        names, numbers = row[: table.names], row[table.names :]
        below = [setting for name in names[2:] if name.text for setting in name.text.split(", ")]
        name = "\n  ".join([", ".join(name.text for name in names[:2]), *below])
        # Text: a name with [brackets] is not markup
        grid.add_row(Text(name), *(Text(number.text, style="bold" if number.bold else "") for number in numbers))
    remarks = [Text(line) for line in table.remarks]
    notes = [Text(note, style="dim") for note in table.notes]
    under = [Text(), *remarks, *notes] if remarks or notes else []
    return [Text(table.title, style="bold"), Text(), grid, *under]


def as_markdown(tables: list[Table]) -> str:
    return "\n".join(map(markdown, tables))


def markdown_text(text: str) -> str:
    """No tag, link or picture, and no line of its own, comes of it; what means something only to Markdown stays."""
    return re.sub(r"\\|<(?=[A-Za-z/!?])|(?<=\])\(", r"\\\g<0>", " ".join(text.splitlines()))


def in_cell(text: str) -> str:
    return markdown_text(text).replace("|", r"\|")


def markdown(table: Table) -> str:
    def text_of(entry: Entry) -> str:
        text = in_cell(entry.text)
        return f"**{text}**" if entry.bold else text

    lines = [list(map(in_cell, table.header)), *(list(map(text_of, row)) for row in table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(line: list[str]) -> str:
        names = [text.ljust(w) for text, w in zip(line, widths, strict=True)][: table.names]
        numbers = [text.rjust(w) for text, w in zip(line, widths, strict=True)][table.names :]
        return f"| {' | '.join(names + numbers)} |"

    rule = ["-" * w if i < table.names else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    grid = [aligned(lines[0]), aligned(rule), *map(aligned, lines[1:])]
    under = [f"- {markdown_text(line)}" for line in table.remarks + table.notes]
    return "\n".join([f"**{markdown_text(table.title)}**", "", *grid, "", *under]).rstrip("\n") + "\n"


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "α": r"$\alpha$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    MISSING: "--",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def latex_text(text: str) -> str:
    return "".join(LATEX.get(c, c) for c in text)


def as_latex(tables: list[Table]) -> str:
    return "\n".join(map(latex, tables))


def latex(table: Table) -> str:
    def text_of(entry: Entry) -> str:
        return rf"\textbf{{{latex_text(entry.text)}}}" if entry.bold else latex_text(entry.text)

    head = " & ".join(map(latex_text, table.header)) + r" \\"
    body = [" & ".join(map(text_of, row)) + r" \\" for row in table.rows]
    # Words, such as what differs from a published setting, have to wrap.
    columns = ["p{5cm}" if is_long(table, i) else "l" if i < table.names else "r" for i in range(len(table.header))]
    bold = any(entry.bold for row in table.rows for entry in row)
    caption = f"{table.title}. {table.notes[0]}" if bold and table.notes else table.title
    lines = [
        *(f"% {' '.join(line.splitlines())}" for line in table.remarks + table.notes),  # a new line would be LaTeX
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{latex_text(caption)}}}",
        rf"\begin{{tabular}}{{{''.join(columns)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def is_long(table: Table, column: int) -> bool:
    """True if a column has words of more than 30 letters and no numbers."""
    cells = [row[column] for row in table.rows]
    return all(cell.value is None for cell in cells) and any(len(cell.text) > 30 for cell in cells)

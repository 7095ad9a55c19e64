"""Tables as text for the terminal (rich), Markdown and LaTeX (booktabs)."""

import re
from dataclasses import dataclass, field, replace
from io import StringIO
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from .console import duration

MISSING = "–"


@dataclass(frozen=True)
class Bar:
    """An interval around its mean on the axis of its column; 0 and 1 are the ends of the axis."""

    zero: float  # the place of a difference of 0
    low: float
    mean: float
    high: float

    def places(self, start: float, length: float, digits: int | None = None) -> list[Any]:
        """zero, low, mean and high on an axis, rounded and cut to its ends."""
        parts = (self.zero, self.low, self.mean, self.high)
        return [round(start + length * min(max(part, 0), 1), digits) for part in parts]

    def text(self, width: int = 17) -> str:
        zero, low, mean, high = self.places(0, width - 1)
        cells = [" "] * width
        cells[low : high + 1] = "─" * (high - low + 1)
        cells[zero] = "┼" if self.low < self.zero < self.high else "│"
        cells[mean] = "◂" if self.mean < 0 else "▸" if self.mean > 1 else "●"
        return "".join(cells)

    def latex(self) -> str:
        zero, low, mean, high = self.places(0, 60, 1)
        interval = rf"\put({low},3){{\line(1,0){{{high - low:.1f}}}}}" if high > low else ""
        return (
            rf"\begin{{picture}}(60,6)\put({zero},0){{\line(0,1){{6}}}}{interval}"
            rf"\put({mean},3){{\circle*{{3}}}}\end{{picture}}"
        )


def usual_ends(spans: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The ends of an axis with 0 for (low, mean, high). Means three times as far from 0 as usual do not stretch it."""
    limit = 3 * median(max(abs(low), abs(high)) for low, _, high in spans) or 1.0
    usual = [span for span in spans if abs(span[1]) <= limit]
    least = max(-limit, min(0.0, *(low for low, _, _ in usual)))
    most = min(limit, max(0.0, *(high for _, _, high in usual)))
    return (least, most) if least < most else (-limit, limit)


def bars(spans: list[tuple[float, float, float]]) -> list[Bar]:
    """Bars of (low, mean, high) on one axis."""
    least, most = usual_ends(spans)
    return [Bar(*((value - least) / (most - least) for value in (0, *span))) for span in spans]


@dataclass(frozen=True)
class Entry:
    text: str
    value: float | None = None  # the number to sort by; None: sorted by its text
    bold: bool = False
    bar: Bar | None = None  # drawn in place of the text
    picture: str = ""  # a data URI, which a page shows above the text


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    rows: list[list[Entry]]  # each as long as the header
    names: int  # number of columns at the left that are names; the others are numbers
    remarks: list[str] = field(default_factory=list)  # under the table, one line each
    notes: list[str] = field(default_factory=list)  # the small print: settings, hardware, computation
    verdict: str = ""  # a sentence above the table

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"{self.title}: every row needs {len(self.header)} entries")

    def columns(self, kept: list[int]) -> "Table":
        """The table with these columns alone."""
        return replace(
            self,
            header=[self.header[i] for i in kept],
            rows=[[row[i] for i in kept] for row in self.rows],
            names=sum(i < self.names for i in kept),
        )

    def without_empty(self) -> "Table":
        """The table without columns that are empty in all of its rows."""
        return self.columns([i for i in range(len(self.header)) if any(row[i].text or row[i].bar for row in self.rows)])


def table_of(title: str, rows: "list[dict[str, str | Entry]]", names: int, **words: Any) -> Table:
    """A table of rows with the same named columns, without columns that are empty in all rows.

    words: remarks, notes and a verdict, as a Table has them.
    """
    return Table(title, list(rows[0]), [entries(*row.values()) for row in rows], names, **words).without_empty()


def number(value: float | None, form: str = ",", unit: str = "") -> Entry:
    return Entry(MISSING) if value is None else Entry(f"{value:{form}}{unit}", value)


def time_entry(seconds: float | None) -> Entry:
    return Entry(MISSING) if seconds is None else Entry(duration(seconds), seconds)


def entries(*cells: "str | Entry") -> list[Entry]:
    return [cell if isinstance(cell, Entry) else Entry(cell) for cell in cells]


# ---- on a screen -----------------------------------------------------------------------------------------

UNCUT = 100_000  # columns, so that no line is wrapped in a pipe or a file
PIPED = 100  # columns of a table there, unless its names and numbers need more
NAMES, WORDS = 20, 16  # columns that names and words keep where numbers need the rest
LONG = 30  # letters; longer words wrap in a pipe, and in LaTeX


def on_screen(tables: list[Table], terminal: bool) -> str:
    """The tables as wide as the terminal and with styles, or as plain text in which only long words wrap."""
    console = Console(file=None if terminal else StringIO(), highlight=False, width=None if terminal else UNCUT)
    with console.capture() as captured:
        console.print(as_rich(tables, console.width if terminal else None))
    return "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def as_rich(tables: list[Table], width: int | None) -> Group:
    """The tables for a console of `width` columns, or for a pipe. No number is ever cut."""
    parts: list[RenderableType] = []
    for table in tables:
        if parts:
            parts.append(Text())
        parts += [Text(line, style="bold") for line in [table.title] if line]
        parts += [Text(line) for line in [table.verdict] if line]
        parts += [Text()] * bool(parts) + fitting(table, width or width_in_a_pipe(table))
        remarks = [Text(line) for line in table.remarks] + [Text(note, style="dim") for note in table.notes]
        parts += [Text(), *remarks] if remarks else []
    return Group(*parts)


def fitting(table: Table, width: int) -> list[RenderableType]:
    """One grid if the columns fit, if necessary without bars; else several grids, or a line for each number."""
    names, numbers = list(range(table.names)), list(range(table.names, len(table.header)))
    room = width - least_name(table)
    drawn = [i for i in numbers if any(row[i].bar for row in table.rows)]
    needed = sum(least(table, i) + 2 for i in numbers)
    if needed > room >= needed - sum(least(table, i) + 2 for i in drawn):
        numbers = [i for i in numbers if i not in drawn]
    blocks: list[list[int]] = []
    for i in numbers:
        if blocks and sum(least(table, j) + 2 for j in [*blocks[-1], i]) <= room:
            blocks[-1].append(i)
        else:
            blocks.append([i])
    if len(blocks) > 1 and len(blocks) * (len(table.rows) + 2) > len(table.rows) * (len(numbers) + 1):
        return in_lines(table.columns([*names, *numbers]), width)
    made: list[RenderableType] = []
    for block in blocks or [[]]:
        made += [Text()] * bool(made) + [grid(table.columns([*names, *block]), width)]
    return made


def name_of(table: Table, row: list[Entry]) -> str:
    """The names of a row in one column; from the third name on one per line."""
    below = [setting for name in row[2 : table.names] if name.text for setting in name.text.split(", ")]
    return "\n  ".join([", ".join(name.text for name in row[: min(2, table.names)] if name.text), *below])


def widest(texts: "list[str]") -> int:
    return max((cell_len(line) for text in texts for line in text.splitlines()), default=0)


def title_of_names(table: Table) -> str:
    return ", ".join(table.header[: min(2, table.names)])


def least_name(table: Table) -> int:
    names = min(NAMES, widest([name_of(table, row) for row in table.rows]))
    return max(names, widest(title_of_names(table).split()))


def least(table: Table, column: int) -> int:
    """The columns of the screen that a column of the table needs: titles wrap between words, numbers never."""
    found = max(widest([shown(row[column]) for row in table.rows]), widest(table.header[column].split()))
    return min(WORDS, found) if of_words(table, column) else found


def width_in_a_pipe(table: Table) -> int:
    """PIPED columns, or as many as the table needs if only texts of more than LONG letters wrap, between words."""
    needed = widest([title_of_names(table), *(name_of(table, row) for row in table.rows)])
    for i in range(table.names, len(table.header)):
        texts = [table.header[i], *(shown(row[i]) for row in table.rows)]
        longest = widest([word for text in texts for word in text.split()])
        needed += 2 + (max(min(LONG, widest(texts)), longest) if of_words(table, i) else widest(texts))
    return max(PIPED, needed)


def shown(entry: Entry) -> str:
    return entry.bar.text() if entry.bar else entry.text


def grid(table: Table, width: int) -> RichTable:
    titles = [title_of_names(table), *table.header[table.names :]]
    rows = [[name_of(table, row), *map(shown, row[table.names :])] for row in table.rows]
    numbers = range(table.names, len(table.header))
    widths = [least_name(table), *(least(table, i) for i in numbers)]
    spare = width - sum(widths) - 2 * len(numbers)
    for i, texts in enumerate(zip(titles, *rows, strict=True)):  # names first
        more = min(max(0, spare), max(0, widest(list(texts)) - widths[i]))
        widths[i], spare = widths[i] + more, spare - more
    made = RichTable(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    for i, (title, columns) in enumerate(zip(titles, widths, strict=True)):
        column = table.names + i - 1
        left = i == 0 or of_words(table, column) or any(row[column].bar for row in table.rows)
        made.add_column(Text(title), justify="left" if left else "right", width=columns, overflow="fold")
    for row, cells in zip(table.rows, rows, strict=True):
        styles = ["", *("bold" if entry.bold else "" for entry in row[table.names :])]
        made.add_row(*map(Text, cells, styles))  # Text: a name with [brackets] is not markup
    return made


def in_lines(table: Table, width: int) -> list[RenderableType]:
    """A small grid for each row, with a line for each of its numbers."""
    made: list[RenderableType] = []
    for row in table.rows:
        lines = [[Entry(title), cell] for title, cell in zip(table.header, row, strict=True)][table.names :]
        small = Table("", [name_of(table, row).replace("\n ", ","), ""], lines, 1)
        made += [Text()] * bool(made) + [grid(small, width)]
    return made


def of_words(table: Table, column: int) -> bool:
    """True if a column has no number: its words may wrap."""
    return all(row[column].value is None and not row[column].bar for row in table.rows)


# ---- to paste --------------------------------------------------------------------------------------------


def as_markdown(tables: list[Table]) -> str:
    return "\n".join(map(markdown, tables))


def markdown_text(text: str) -> str:
    """Text that makes no tag, link, picture or line of its own in Markdown. Other marks of Markdown stay."""
    return re.sub(r"\\|<(?=[A-Za-z/!?])|(?<=\])\(", r"\\\g<0>", " ".join(text.splitlines()))


def in_cell(text: str) -> str:
    return markdown_text(text).replace("|", r"\|")


def markdown(table: Table) -> str:
    def text_of(entry: Entry) -> str:
        text = f"`{entry.bar.text().replace(' ', '·')}`" if entry.bar else in_cell(entry.text)
        return f"**{text}**" if entry.bold else text

    lines = [list(map(in_cell, table.header)), *(list(map(text_of, row)) for row in table.rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]

    sides = [str.ljust] * table.names + [str.rjust] * (len(widths) - table.names)

    def aligned(line: list[str]) -> str:
        return f"| {' | '.join(side(text, w) for side, text, w in zip(sides, line, widths, strict=True))} |"

    rule = ["-" * w if i < table.names else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    grid = [aligned(lines[0]), aligned(rule), *map(aligned, lines[1:])]
    above = [f"**{markdown_text(table.title)}**", "", *([markdown_text(table.verdict), ""] if table.verdict else [])]
    under = [f"- {markdown_text(line)}" for line in table.remarks + table.notes]
    return "\n".join([*above, *grid, "", *under]).rstrip("\n") + "\n"


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "α": r"$\alpha$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    MISSING: "--",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def latex_text(text: str) -> str:
    """Special characters as LaTeX has them. The hyphen of a negative number is a minus."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", "".join(LATEX.get(c, c) for c in text))


def as_latex(tables: list[Table]) -> str:
    return "\n".join(map(latex, tables))


def latex(table: Table) -> str:
    def text_of(entry: Entry) -> str:
        if entry.bar:
            return entry.bar.latex()
        return rf"\textbf{{{latex_text(entry.text)}}}" if entry.bold else latex_text(entry.text)

    head = " & ".join(map(latex_text, table.header)) + r" \\"
    body = [" & ".join(map(text_of, row)) + r" \\" for row in table.rows]
    # Columns of words, such as differences from a published setting, have to wrap.
    long = [of_words(table, i) and any(len(row[i].text) > LONG for row in table.rows) for i in range(len(table.header))]
    columns = ["p{5cm}" if wraps else "l" if i < table.names else "r" for i, wraps in enumerate(long)]
    bold = any(entry.bold for row in table.rows for entry in row)
    said = [table.title, table.verdict.removesuffix("."), table.notes[0] if bold and table.notes else ""]
    star = "*" * (len(table.header) > 7)  # as wide as both columns of a page
    lines = [
        r"% needs \usepackage{booktabs}",
        *(f"% {' '.join(line.splitlines())}" for line in table.remarks + table.notes),  # a new line would be LaTeX
        rf"\begin{{table{star}}}[t]",
        r"\centering",
        rf"\caption{{{latex_text('. '.join(filter(None, said)))}}}",
        rf"\begin{{tabular}}{{{''.join(columns)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\end{{table{star}}}",
    ]
    return "\n".join(lines) + "\n"

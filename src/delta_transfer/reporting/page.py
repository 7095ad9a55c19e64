"""delta-report --format html: a comparison -> one page that needs no network and works from a file.

The page has tables that sort, learning curves, histograms and maps, pictures, and a table of all runs. page.css has its
looks; page.js sorts and filters the tables, shows how a run was made, and draws the curves of the runs that are ticked.
The text of the page depends on records and pictures alone.
"""

import json
import math
from base64 import b64encode
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from itertools import accumulate
from pathlib import Path

from ..common.console import Warn
from ..common.tables import Bar, Entry, Table
from ..records.files import MIB, read_regular
from ..records.reading import Record, config_of, is_number
from .comparison import Comparison, distinct_runs, grouped
from .logs import Curves, curves_of
from .page_charts import (
    Group,
    Key,
    attention_histograms,
    learning_curves,
    matched_amounts,
    painted,
)
from .page_runs import best_first, curves_and_settings, drawn_runs, how_made, table_of_runs
from .record_views import dataset_and_backbone
from .thumbnails import with_thumbnails
from .trust import trusted
from .trust_tables import MOST, summary, trust_tables

# With this policy the browser loads nothing that is not in the file.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST_PICTURE = 64 * MIB
RELOAD = 30  # seconds
MAX_OPEN, MAX_GROUPS = 4, 40  # groups of charts that are open, and groups in the page
MOST_LOGITS = 100_000_000  # of the runs whose predictions the page looks at; they are in memory, 4 bytes each
LINES = 10  # of a table about the classes or images of a model
MAX_NAMES = 6  # in the line below the title
LONG = 40  # characters; longer texts in a cell get a wide column of small print

CURVES = (
    "A line is the mean over a method's seeds, at the iterations that all its runs logged; the band is its 95 % t "
    "interval. Penalties are drawn as they were added to the loss, with alpha and beta. A quantity that was measured "
    "only once is only in the tables. A click on a name hides its line."
)
ATTENTION = (
    "The number of channels of a tapped layer by their weight. The weights of a layer are divided by their mean: at 1 "
    "(dashed) a channel counts as it does without attention."
)

MATCHING = (
    "The mean amount lambda of each pair of taps over the training images since the log line before; mean over a "
    "method's seeds, bands as in the learning curves. Maps: at the last line, source taps downwards, empty where "
    "there is no such pair. Amounts weigh errors of maps of different scales: they say where the method pulled, not "
    "how much a layer matters."
)


def page(
    tables: list[Table],
    comparison: Comparison,
    pictures: list[Path],
    warn: Warn,
    reloads: bool = False,
    images: Path | None = None,
) -> str:
    """The whole page. `pictures`: PNG files; a text file beside one, of the same stem, is its caption.

    `warn` names what is missing or cannot be read, which is left out. reloads: the browser reads it anew now and then.
    images: the folder of the data set, whose images that are most often wrong are shown.
    """
    curves = curves_of(comparison, warn)
    first = "Leaderboard" if any(table.verdict for table in tables) else "Results"
    sections = [
        ("tables", first, "\n".join(map(table_html, tables))),
        ("curves", "Learning curves", groups_html(learning_curves(comparison, curves), CURVES)),
        ("attention", "Channel attention", groups_html(attention_histograms(comparison, warn), ATTENTION)),
        ("matching", "What is matched, how much", groups_html(matched_amounts(comparison, curves), MATCHING)),
        ("trust", "Can the models be trusted?", trust_html(comparison, images)),
        ("pictures", "Case study", "\n".join(filter(None, (picture_html(path, warn) for path in pictures)))),
        ("runs", "Runs", runs_html(comparison, curves)),
    ]
    sections = [section for section in sections if section[2]]
    links = "\n".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "\n".join(f'<section id="{name}">\n<h2>{title}</h2>\n{inner}\n</section>' for name, title, inner in sections)
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">{f'<meta http-equiv="refresh" content="{RELOAD}">' * reloads}
<title>delta-transfer: {escape(names(comparison, "dataset"))}</title>
<style>
{own_file("page.css")}</style>
</head>
<body>
<header>
<h1>A comparison of fine-tuning methods</h1>
<p>{escape(summary_line(comparison))}</p>
<nav aria-label="Sections">
{links}
</nav>
</header>
<main>
{body}
</main>
<script>
{own_file("page.js")}</script>
</body>
</html>
"""


def own_file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


# ---- summary ---------------------------------------------------------------------------------------------


def summary_line(comparison: Comparison) -> str:
    runs = records_of(comparison)
    methods, datasets, backbones = len(comparison.methods), names(comparison, "dataset"), names(comparison, "backbone")
    newest = max(filter(None, map(finished, runs)), default=None)
    when = newest.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if newest else "at a time that is not recorded"
    many = len({row.dataset for row in comparison.rows})
    return (
        f"{counted(len(runs), 'run')} of {counted(methods, 'method')} on {counted(many, 'data set')} ({datasets}) with "
        f"{backbones}; the newest finished {when}."
    )


def records_of(comparison: Comparison) -> list[Record]:
    return distinct_runs(run for row in comparison.rows for cell in row.cells.values() for run in cell.runs)


def finished(record: Record) -> datetime | None:
    """The time when the run finished; None if the record has no time, or one without a time zone."""
    try:
        time = datetime.fromisoformat(record["finished"])
    except (KeyError, TypeError, ValueError):
        return None
    return time if time.tzinfo else None


def names(comparison: Comparison, part: str) -> str:
    found = list(dict.fromkeys(getattr(row, part) for row in comparison.rows))
    found = [comparison.dataset_title(name) for name in found] if part == "dataset" else found
    more = [f"{len(found) - MAX_NAMES} more"] if len(found) > MAX_NAMES else []
    return ", ".join(found[:MAX_NAMES] + more)


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


# ---- charts ----------------------------------------------------------------------------------------------


def groups_html(groups: list[Group], remark: str) -> str:
    if not groups:
        return ""
    is_open = " open" if len(groups) <= MAX_OPEN else ""
    lines = [f"<p>{escape(remark)}</p>"]
    if len(groups) > MAX_GROUPS:
        lines.append(
            f"<p>The page has the first {MAX_GROUPS} of {len(groups)}; a page of fewer runs has the others.</p>"
        )
    for group in groups[:MAX_GROUPS]:
        lines += [f'<details class="group"{is_open}>', f"<summary>{escape(group.title)}</summary>"]
        lines += [f"<p>{escape(line)}</p>" for line in group.remarks]
        if group.keys:
            lines += ['<div class="legend">', *(key_html(i, key) for i, key in enumerate(group.keys)), "</div>"]
        lines.append('<div class="charts">')
        lines += [f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>" for title, chart in group.charts]
        lines += ["</div>", "</details>"]
    return "\n".join(lines)


def key_html(number: int, key: Key) -> str:
    line = f'<path d="M0 5H30" {painted(key.colour)} stroke-width="2.5"{key.look}/>'
    return (
        f'<button type="button" aria-pressed="true" value="{number}">'
        f'<svg class="chart" width="30" height="10" aria-hidden="true">{line}</svg>'
        f"{escape(key.label)} ({key.n})</button>"
    )


# ---- trust -----------------------------------------------------------------------------------------------


def trust_html(comparison: Comparison, images: Path | None) -> str:
    """A line for each model with predictions, and details for the first result of each leaderboard."""
    runs = [run for one in best_first(comparison) for run in one.cell.runs] + comparison.on_folds
    logits = accumulate(outputs_of(run) for run in runs)
    kept = {id(config_of(run)) for run, count in zip(runs, logits, strict=True) if count <= MOST_LOGITS}
    runs = records_of(comparison)
    own = set(map(id, map(config_of, runs)))
    looked_at = [run for run in runs + comparison.on_folds if id(config_of(run)) in kept]
    found = trusted(looked_at, lambda _: None)  # the report has named damaged files
    judged = [one for one in found if id(config_of(one.record)) in own]
    if not judged:
        return ""
    by_run = {id(config_of(one.record)): one for one in judged}
    each = [
        [by_run[key] for run in one.cell.runs if (key := id(config_of(run))) in by_run]
        for one in best_first(comparison)
    ]
    leaders = [own[0] for own in each if own][:MOST]
    more = [
        table
        for _, models in grouped(leaders, lambda one: dataset_and_backbone(one.record)[0])
        for table in trust_tables(models, LINES)[1:]
    ]
    if images:
        more = [with_thumbnails(table, images) if table.header[0] == "image" else table for table in more]
    each_run = summary(judged)
    if left_out := len(runs + comparison.on_folds) - len(looked_at):
        each_run.notes.append(
            f"The page looks at the predictions of {len(looked_at):,} runs, those of the best results, and leaves out "
            f"{left_out:,} others; delta-report trust RUN looks at any of them"
        )
    return "\n".join(
        [
            table_html(each_run),
            '<details class="group">',
            f"<summary>Classes, mistakes and calibration: {escape('; '.join(one.name for one in leaders))}</summary>",
            *map(table_html, more),
            "</details>",
        ]
    )


def outputs_of(run: Record) -> int:
    """How many logits the predictions of a run have, by its record."""
    counts = [run.get(key) for key in ("n_test", "n_val", "num_classes")]
    images, held_out, classes = (count if is_number(count) else 0 for count in counts)
    return int(max(images, held_out) * classes)


# ---- pictures --------------------------------------------------------------------------------------------


def picture_html(path: Path, warn: Warn) -> str | None:
    try:
        data = read_regular(path, LARGEST_PICTURE)
        beside = path.with_suffix(".txt")
        caption = read_regular(beside, MIB).decode().strip() if beside.exists() else path.stem
    except (OSError, ValueError) as error:
        warn(f"not in the page: {path} or its caption cannot be read: {error}")
        return None
    if not data.startswith(PNG):
        warn(f"not in the page: {path} is not a PNG file")
        return None
    source = f"data:image/png;base64,{b64encode(data).decode()}"
    return (
        f'<figure class="picture"><img src="{source}" alt="{escape(path.stem)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table_html(table: Table) -> str:
    return "\n".join(
        [
            f"<h3>{escape(table.title)}</h3>",
            *([f'<p class="verdict">{escape(table.verdict)}</p>'] if table.verdict else []),
            grid_html(table),
            *list_html("remarks", table.remarks),
            *list_html("notes", table.notes),
        ]
    )


def grid_html(table: Table, kind: str = "sortable") -> str:
    # A column of words among the numbers, such as differences from a published setting, is set like names.
    kinds = [
        "number"
        if i >= table.names and any(row[i].value is not None for row in table.rows)
        else "long"
        if i and any(len(row[i].text) > LONG for row in table.rows)
        else ""
        for i in range(len(table.header))
    ]

    def head(title: str, kind: str) -> str:
        button = f'<button type="button">{escape(title)}</button>' if title else ""
        return f'<th scope="col"{css_class(kind.removeprefix("long"))}>{button}</th>'

    def cell(entry: Entry, kind: str) -> str:
        value = f' data-value="{entry.value:.7g}"' if entry.value is not None and math.isfinite(entry.value) else ""
        text = bar_html(entry.bar) if entry.bar else escape(entry.text)
        text = f'<img src="{entry.picture}" alt="">{text}' if entry.picture else text
        kind = kind.removeprefix("number" if value else "")  # page.css sets both to the right
        return f"<td{css_class(kind)}{value}>{f'<strong>{text}</strong>' if entry.bold else text}</td>"

    return "\n".join(
        [
            '<div class="scroll" tabindex="0">',
            f'<table class="{kind}" aria-label="{escape(table.title)}">',
            f"<thead><tr>{''.join(map(head, table.header, kinds))}</tr></thead>",
            "<tbody>",
            *(f"<tr>{''.join(map(cell, row, kinds))}</tr>" for row in table.rows),
            "</tbody>",
            "</table>",
            "</div>",
        ]
    )


def bar_html(bar: Bar) -> str:
    """A small drawing in the colour of the text. An arrow means a value beyond the end of the axis."""
    zero, low, mean, high = bar.places(4, 112, 1)
    mark = f'<circle cx="{mean}" cy="8" r="3.5"/>'
    if not 0 <= bar.mean <= 1:
        mark = f'<path d="{"M0 8L8 3V13Z" if bar.mean < 0 else "M120 8L112 3V13Z"}"/>'
    return (
        f'<svg class="bar" viewBox="0 0 120 16" width="120" height="16" aria-hidden="true">'
        f'<path d="M{zero} 0V16" class="zero"/><path d="M{low} 8H{high}" class="interval"/>{mark}</svg>'
    )


def css_class(name: str) -> str:
    return f' class="{name}"' if name else ""


def list_html(name: str, lines: list[str]) -> list[str]:
    return [f'<ul class="{name}">', *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"] if lines else []


# ---- runs ------------------------------------------------------------------------------------------------


def runs_html(comparison: Comparison, groups: list[list[Curves]]) -> str:
    """A table with a line for each run, which page.js filters, and the data of what it draws, compares and shows."""
    table, runs = table_of_runs(comparison)
    logs, left_out = drawn_runs(comparison, groups)
    said = (
        f"The page has the curves of {len(logs):,} runs, those of the best results, and leaves out {left_out:,} others."
    )
    data = json.dumps(curves_and_settings(runs, logs) | how_made(runs), separators=(",", ":"), ensure_ascii=False)
    data = data.replace("<", r"\u003c")  # a text of a record ends no script
    script = f'<script type="application/json" id="logs">{data}</script>'
    return "\n".join([*([f"<p>{said}</p>"] if left_out else []), grid_html(table, "sortable filtered"), script])

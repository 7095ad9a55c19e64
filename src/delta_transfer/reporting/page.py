"""delta-report --format html: a comparison -> one page that needs no network and works from a file.

The page has tables that sort, learning curves, histograms and maps, pictures, and a table of all runs with how each was
made. page.css has its looks, page.js its behaviour. Its text depends on records and pictures alone.
"""

from base64 import b64encode
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from ..common.console import Warn
from ..common.tables import Table
from ..records.files import MIB, read_regular
from ..records.reading import Record
from .comparison import Comparison, distinct_runs
from .logs import curves_of
from .page_charts import Group, Key, attention_histograms, learning_curves, matched_amounts
from .page_tables import runs_html, table_html
from .svg import painted
from .trust import trusted
from .trust_tables import summary

# With this policy the browser refuses everything that is not in the file.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST_PICTURE = 64 * MIB
RELOAD = 30  # seconds
MAX_OPEN = 4  # groups of charts; more are folded up, so that a page of many data sets stays short
MAX_NAMES = 6  # in the line below the title

CURVES = (
    "Mean over the seeds of a cell, at the iterations that all its runs logged; the band is its 95 % t interval. "
    "Penalties are drawn as they were added to the loss, with alpha and beta. A quantity that was measured "
    "only once is in the tables alone. A click on a name hides its line."
)
ATTENTION = (
    "How many channels of a tapped layer have which weight. The weights of a layer are divided by their mean: at 1 "
    "(dashed) a channel counts as it does without attention."
)

MATCHING = (
    "The mean amount lambda of each pair of taps over the training images since the log line before; mean over the "
    "seeds of a cell, bands as in the learning curves. Maps: at the last line, source taps downwards, empty where "
    "there is no such pair. Amounts weigh errors of maps of different scales: they say where the method pulled, not "
    "how much a layer matters."
)


def page(tables: list[Table], comparison: Comparison, pictures: list[Path], warn: Warn, reloads: bool = False) -> str:
    """The whole page. `pictures`: PNG files; a text file beside one, of the same stem, is its caption.

    `warn` names what is missing or cannot be read, which is left out. reloads: the browser reads it anew now and then.
    """
    curves = curves_of(comparison, warn)
    judged = trusted(records_of(comparison), lambda _: None)  # the report has named damaged files
    sections = [
        (
            "tables",
            "Leaderboard" if any(table.verdict for table in tables) else "Results",
            "\n".join(map(table_html, tables)),
        ),
        ("curves", "Learning curves", groups_html(learning_curves(comparison, curves), CURVES)),
        ("attention", "Channel attention", groups_html(attention_histograms(comparison, warn), ATTENTION)),
        ("matching", "What is matched, how much", groups_html(matched_amounts(comparison, curves), MATCHING)),
        ("trust", "Can the models be trusted?", table_html(summary(judged)) if judged else ""),
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
    """When the run finished; None if the record has no time, or one without a time zone."""
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
    for group in groups:
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

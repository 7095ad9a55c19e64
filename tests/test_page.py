"""The HTML page: exact text on synthetic records, and what a browser makes of it."""

import json
import math
import re
import shutil
import subprocess
from base64 import b64decode
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from delta_transfer.common.tables import Entry, Table, entries
from delta_transfer.records import reading as runs
from delta_transfer.reporting import page as module
from delta_transfer.reporting import page_charts, page_runs
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.leaderboard import leaderboards
from delta_transfer.reporting.logs import curves_of
from delta_transfer.reporting.page import page, table_html
from delta_transfer.reporting.page_charts import MAX_LINES, POINTS, attention_histograms, learning_curves
from delta_transfer.reporting.page_runs import FEWEST_POINTS, MOST_POINTS, curves_and_settings, drawn_runs, how_made

from .test_report import assert_golden, record, save, three_methods

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
PNG = b64decode(PIXEL)


def never(line):
    pytest.fail(f"warned: {line}")


def read_back(folder, records, logs=None):
    """The records as delta-report reads them; `logs`: lines of metrics.jsonl by run id."""
    save(folder, records)
    for run_id, lines in (logs or {}).items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "runs" / run_id / "metrics.jsonl").write_text(text)
    return [runs.read(path) for path in runs.run_folders([folder])]


def lines_of(chart):
    """The points (N, 2) of each line of a chart."""
    found = re.findall(r'<polyline points="(.*?)"', chart)
    return [np.array([point.split(",") for point in line.split()], float) for line in found]


def curves(comparison, warn):
    return learning_curves(comparison, curves_of(comparison, warn))


def log(values, name="loss", every=10):
    return [{"step": every * (i + 1), name: value} for i, value in enumerate(values)]


def two_seeds(folder, first, second):
    """A comparison of one method with two seeds, which logged these lines."""
    records = [record("delta", 0), record("delta", 1)]
    return compare(read_back(folder, records, {records[0]["run_id"]: first, records[1]["run_id"]: second}))


@pytest.fixture
def markers(monkeypatch):
    """In place of the page's own style and script."""
    monkeypatch.setattr(module, "own_file", lambda name: f"{name}\n")


# ---- golden text -----------------------------------------------------------------------------------------


def test_table():
    table = Table(
        "Accuracy <%>",
        ["dataset", "", "L2", "differs"],
        [
            entries("cub & co", "a", Entry("52.0 ± 2.0 (3)", 52.0, bold=True), "weights"),
            entries("dogs", "b", Entry("–"), "a long list of settings that differ, with commas"),
            entries("cars", "c", Entry("nan", math.nan), ""),
        ],
        names=2,
        remarks=["a < b"],
        notes=["small print"],
    )
    assert (
        table_html(table)
        == """\
<h3>Accuracy &lt;%&gt;</h3>
<div class="scroll" tabindex="0">
<table class="sortable" aria-label="Accuracy &lt;%&gt;">
<thead><tr><th scope="col"><button type="button">dataset</button></th><th scope="col"></th>\
<th scope="col" class="number"><button type="button">L2</button></th>\
<th scope="col"><button type="button">differs</button></th></tr></thead>
<tbody>
<tr><td>cub &amp; co</td><td>a</td><td data-value="52">\
<strong>52.0 ± 2.0 (3)</strong></td><td class="long">weights</td></tr>
<tr><td>dogs</td><td>b</td><td class="number">–</td>\
<td class="long">a long list of settings that differ, with commas</td></tr>
<tr><td>cars</td><td>c</td><td class="number">nan</td>\
<td class="long"></td></tr>
</tbody>
</table>
</div>
<ul class="remarks">
<li>a &lt; b</li>
</ul>
<ul class="notes">
<li>small print</li>
</ul>"""
    )


def test_page(tmp_path, markers, monkeypatch, request):
    monkeypatch.setattr(module, "CURVES", "CURVES")
    made = {"command": "delta-run reg=delta", "overrides": ["reg=delta", "seed=0"]}
    records = [
        record("delta", 0, finished="2026-11-21T23:26:00+0100", **made),  # the newest, though its clock says less
        record("delta", 1, finished="2026-11-21T22:25:00+0000", versions=None),
    ]
    logs = {records[0]["run_id"]: log([5.0, 2.0]), records[1]["run_id"]: log([3.0, 2.0])}
    (tmp_path / "case.png").write_bytes(PNG)
    (tmp_path / "case.txt").write_text("Grad-CAM\n")
    table = Table("Accuracy", ["dataset"], [entries("cub")], 1)
    comparison = compare(read_back(tmp_path, records, logs))
    assert_golden(request, "page.html", page([table], comparison, [tmp_path / "case.png"], never))


def test_the_order_of_records_makes_no_difference(tmp_path, markers):
    records = [record(method, seed) for method in ("l2", "delta", "mine") for seed in range(2)]
    found = read_back(tmp_path, records, {r["run_id"]: log([3.0, 1.0 + r["seed"]]) for r in records})
    assert page([], compare(found), [], never) == page([], compare(found[::-1]), [], never)


def test_a_time_that_is_not_recorded_is_said(tmp_path, markers):
    text = page([], compare(read_back(tmp_path, [record()])), [], lambda _: None)
    assert "the newest finished at a time that is not recorded." in text


def test_many_data_sets_are_counted_not_listed(tmp_path, markers):
    records = [record(run_id=f"run{i}", dataset__name=f"set{i}", dataset_fingerprint=str(i)) for i in range(8)]
    text = page([], compare(read_back(tmp_path, records)), [], lambda _: None)
    assert "8 runs of 1 method on 8 data sets (set0, set1, set2, set3, set4, set5, 2 more) with resnet18;" in text


EVIL = "<script>hacked = 1</script></script><img src=x onerror='hacked = 2'>\"'&"


def evil_page(folder):
    """With EVIL wherever a person may have written something."""
    made = {"command": EVIL, "overrides": [EVIL], "versions": {EVIL: EVIL}, "device": EVIL, "git_commit": EVIL}
    records = [record("delta", s, backbone__name=EVIL, run_id=f"run{s}", finished=EVIL, **made) for s in range(2)]
    for one in records:
        one["config"]["reg"]["name"] = one["titles"]["method"] = EVIL
    found = read_back(folder, records, {r["run_id"]: log([3.0, 2.0], EVIL) for r in records})
    found = [one | {"run_id": f"{one['run_id']}{EVIL}"} for one in found]
    (folder / "case.png").write_bytes(PNG)
    (folder / "case.txt").write_text(EVIL)
    table = Table(EVIL, [EVIL], [[Entry(EVIL, 1.0, bold=True)], [Entry(EVIL)]], 1, [EVIL], [EVIL])
    return page([table], compare(found), [folder / "case.png"], never)


def test_everything_is_escaped(tmp_path, markers):
    text = evil_page(tmp_path)
    assert "<script>hacked" not in text and "<img src=x" not in text
    assert text.count("<script") == text.count("</script>") == 2  # the data of runs, and what draws them


# ---- learning curves -------------------------------------------------------------------------------------


def test_mean_and_std_at_the_steps_of_all_seeds(tmp_path):
    [group] = curves(two_seeds(tmp_path, log([4.0, 2.0, 1.0, 9.0]), log([2.0, 2.0, 3.0])), never)
    [(title, chart)] = group.charts
    assert title == "Training loss, all terms" and "DELTA at the end: 2 ± 13 (95 % interval)" in chart
    [line] = lines_of(chart)  # three steps at equal distances; the means fall by one, then not at all
    assert np.diff(line[:, 0]) == pytest.approx([150, 150], abs=0.2)
    assert line[0, 1] < line[1, 1] == line[2, 1]
    assert chart.count("<polygon") == 1
    assert [(key.label, key.n) for key in group.keys] == [("DELTA", 2)]


def test_what_is_drawn_and_in_which_order(tmp_path):
    line = {"lr": 0.1, "cross_entropy": 1.0, "head": 0.5, "loss": 1.5, "train_top1": 50.0, "images_per_second": 9.0}
    lines = [{"step": s} | line | ({"test_top1": 40.0, "test_loss": 2.0} if s > 1 else {}) for s in (1, 2, 3)]
    [group] = curves(two_seeds(tmp_path, lines, lines), never)
    assert [title for title, _ in group.charts] == [
        "Test accuracy (%)",
        "Training accuracy (%)",
        "Training loss, all terms",
        "Training cross-entropy",
        "Penalty: head",
    ]
    assert len(lines_of(group.charts[0][1])[0]) == 2
    lines[1].pop("test_top1")
    [group] = curves(two_seeds(tmp_path / "once", lines, lines), never)
    assert "Test accuracy (%)" not in [title for title, _ in group.charts]


def test_a_single_seed_has_no_band(tmp_path):
    records = read_back(tmp_path, [record()], {record()["run_id"]: log([2.0, 1.0])})
    [group] = curves(compare(records), never)
    assert "<polygon" not in group.charts[0][1]


def test_a_value_that_is_not_finite_is_a_gap(tmp_path):
    [group] = curves(two_seeds(tmp_path, log([4.0, math.inf, 2.0]), log([2.0, 1.0, 2.0])), never)
    assert len(lines_of(group.charts[0][1])[0]) == 2


def test_missing_and_damaged_logs_are_named(tmp_path):
    records = [record("delta", seed) for seed in range(3)]
    found = read_back(tmp_path, records, {records[2]["run_id"]: log([2.0, 1.0])})
    (found[1]["folder"] / "metrics.jsonl").write_text("{\n")
    said = []
    [group] = curves(compare(found), said.append)
    assert group.keys[0].n == 1 and len(lines_of(group.charts[0][1])[0]) == 2
    assert len(said) == 2 and records[1]["run_id"] in said[0] and records[0]["run_id"] in said[1]


def test_long_curves_are_thinned(tmp_path):
    long = log([1.0] * 3000, every=1)
    [group] = curves(two_seeds(tmp_path, long, long), never)
    [line] = lines_of(group.charts[0][1])
    assert len(line) == POINTS and np.diff(line[:, 0]).max() < 300 / POINTS + 0.3
    assert (line[0, 0], line[-1, 0]) == (page_charts.LEFT, page_charts.WIDTH - page_charts.RIGHT)


def test_a_wide_range_has_a_logarithmic_axis(tmp_path):
    [group] = curves(two_seeds(tmp_path, log([1000.0, 1.0, 10.0]), log([1000.0, 1.0, 10.0])), never)
    [line] = lines_of(group.charts[0][1])
    high, low, middle = line[:, 1]
    assert (low - middle) / (low - high) == pytest.approx(1 / 3, abs=0.01)


def test_no_band_shows_what_cannot_be(tmp_path):
    """Accuracies of 99 and 91 % have an interval beyond 100, and losses one below 0."""
    first, second = ([{"step": s, "test_top1": a, "loss": v} for s in (1, 2)] for a, v in ((99.0, 0.1), (91.0, 0.9)))
    [group] = curves(two_seeds(tmp_path, first, second), never)
    for _, chart in group.charts:
        shown = re.findall(r'text-anchor="end">(.*?)<', chart)
        assert shown and all(0 <= float(value) <= 100 for value in shown)


def test_a_line_for_each_setting_of_a_method(tmp_path):
    records = [record("delta", 0, alpha=alpha) for alpha in (0.1, 0.001, 0.01)] + [record("l2", 0)]
    found = read_back(tmp_path, records, {r["run_id"]: log([2.0, 1.0]) for r in records})
    [group] = curves(compare(found), never)
    labels = ["L2", "DELTA, alpha=0.001", "DELTA, alpha=0.01", "DELTA, alpha=0.1"]
    assert [key.label for key in group.keys] == labels
    assert len({key.colour for key in group.keys}) == 2
    assert len({(key.colour, key.look) for key in group.keys}) == 4


# ---- channel attention -----------------------------------------------------------------------------------


def attention_of(folder, *importances):
    """The histograms of a run for each seed with these importances, a dictionary of taps."""
    taps = [*importances[0]]
    options = {"backbone__taps": taps, "reg__attention": {"temperature": 5.0}}
    found = read_back(folder, [record("delta", seed, **options) for seed in range(len(importances))])
    for one, importance in zip(found, importances, strict=True):
        if importance is not None:
            save_file({tap: np.float32(v) for tap, v in importance.items()}, one["folder"] / "attention.safetensors")
    return attention_histograms(compare(found), never)


def test_weights_that_seeds_share_are_counted_once(tmp_path):
    same = {"layer1": [0.0, 0.0, 9.0], "layer2": [1.0] * 4}
    [group] = attention_of(tmp_path, same, same, None)
    assert (group.title, group.remarks) == ("DELTA, CUB-200-2011, resnet18", [])
    # Standardised 2^-1/2 and -2^1/2, over a temperature of 5.
    heavy = 3 * math.exp(2**0.5 / 5) / (math.exp(2**0.5 / 5) + 2 * math.exp(-(2**-0.5) / 5))
    assert [title for title, _ in group.charts] == [
        f"layer1: 3 channels, largest weight {heavy:.2f}",
        "layer2: 4 channels, largest weight 1.00",
    ]
    counts = re.findall(r"<title>\S+ to \S+: (\d+)</title>", group.charts[0][1])
    assert counts == ["2", "1"]
    x, width = map(float, re.search(r'<rect x="(\S+)" .*?width="(\S+)"', group.charts[0][1]).groups())
    assert x == page_charts.LEFT and width == pytest.approx(
        (page_charts.WIDTH - page_charts.LEFT - page_charts.RIGHT) / 40, abs=0.1
    )


def test_different_weights_are_pooled_and_that_is_said(tmp_path):
    [group] = attention_of(tmp_path, {"a": [0.0, 1.0]}, {"a": [1.0, 0.0]}, {"a": [0.0, 0.0]})
    assert len(group.remarks) == 1 and group.remarks[0].startswith("3 ")
    assert sum(map(int, re.findall(r"to \S+: (\d+)</title>", group.charts[0][1]))) == 6


def test_damaged_weights_are_named_and_no_file_is_no_attention(tmp_path):
    found = read_back(tmp_path, [record("delta", backbone__taps=["a"], reg__attention={"temperature": 5.0})])
    assert attention_histograms(compare(found), never) == []
    (found[0]["folder"] / "attention.safetensors").write_bytes(b"rubbish")
    said = []
    assert attention_histograms(compare(found), said.append) == [] and "attention.safetensors" in said[0]


# ---- pictures --------------------------------------------------------------------------------------------


def test_pictures(tmp_path, markers):
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path / "bad.png").write_text("no picture")
    said = []
    paths = [tmp_path / name for name in ("good.png", "bad.png", "gone.png")]
    text = page([], compare(read_back(tmp_path, [record()])), paths, said.append)
    assert re.findall(r'alt="(.*?)"><figcaption>(.*?)<', text) == [("good", "good")]
    named = [line for line in said if "metrics" not in line]
    assert len(named) == 2 and "bad.png is not a PNG file" in named[0] and "gone.png" in named[1]


# ---- in a browser ----------------------------------------------------------------------------------------

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]

LISTEN = """<script>
const complaints = [];
addEventListener("error", event => complaints.push(event.message), true);
addEventListener("unhandledrejection", event => complaints.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => complaints.push("refused " + event.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...words) => complaints.push(kind + ": " + words.join(" "));
</script>
"""

ASK = """<script>
setTimeout(async () => {
  const found = await (async () => { %s })().catch(error => complaints.push(String(error)));
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  const answer = document.createElement("pre");
  answer.textContent = "ANSWER" + JSON.stringify({found, complaints, loaded}) + "END";
  document.body.replaceChildren(answer);
}, 1500);
</script>
"""


def in_browser(folder: Path, text: str, script: str, width: int = 1280) -> dict:
    """What `script` returns in the page; complaints of the browser, addresses it loaded."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    text, end = text.replace("<title>", f"{LISTEN}<title>", 1).rsplit("</body>", 1)
    (folder / "page.html").write_text(f"{text}{ASK % script}</body>{end}", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    options += [f"--window-size={width},3000", "--virtual-time-budget=10000", "--dump-dom"]
    command = [browser, *options, (folder / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    answer = re.search("ANSWER(.*)END", done.stdout, re.DOTALL)
    assert answer, f"no answer; the end of what the browser said: {done.stderr[-2000:]}"
    return json.loads(unescape(answer[1]))


def real_page(folder):
    """Curves of two methods and a table of numbers that sort otherwise than their text."""
    records = [record(method, seed) for method in ("l2", "delta") for seed in range(2)]
    found = read_back(folder, records, {r["run_id"]: log([4.0, 2.0 + r["seed"], 1.0]) for r in records})
    rows = [entries(name, Entry(text, value)) for name, text, value in (("b", "9.5", 9.5), ("a", "–", None))]
    rows += [entries("set10", Entry("10.5", 10.5)), entries("set9", Entry("-3", -3.0))]
    return page([Table("Numbers", ["dataset", "L2"], rows, 1)], compare(found), [], never)


SORT = """
  const heads = document.querySelectorAll("#tables th"), orders = [];
  for (const column of [1, 1, 0, 0]) {
    heads[column].firstElementChild.click();
    const cells = [...document.querySelectorAll("#tables tbody td:first-child")];
    orders.push([[...heads].map(head => head.getAttribute("aria-sort")), cells.map(cell => cell.textContent)]);
  }
  return orders;
"""

CHARTS = """
  const chart = document.querySelector("figure svg"), button = document.querySelectorAll(".legend button")[1];
  const lines = () => [...chart.querySelectorAll("g[data-key]")].map(line => getComputedStyle(line).display !== "none");
  const before = lines();
  button.click();
  return {before, hidden: lines(), pressed: button.ariaPressed};
"""

FILTER = """
  const select = document.querySelector(".filter select"), rows = [...document.querySelectorAll(".filtered tbody tr")];
  const shown = () => rows.filter(row => row.getBoundingClientRect().height).length, all = shown();
  select.value = select.options[1].value;
  select.dispatchEvent(new Event("change"));
  return [all, shown(), [...select.options].map(option => option.textContent)];
"""

FILTER_PLACES = """
  const parts = () => [...document.querySelectorAll("#tables h3, #tables table, #tables tbody tr, .group")].filter(
    part => part.getBoundingClientRect().height).map(part => part.localName).sort().join(" ");
  const found = [parts()];
  for (const [select, value] of [[0, "cars"], [1, "l2"], [0, ""]]) {
    const chosen = document.querySelectorAll(".filter select")[select];
    chosen.value = value;
    chosen.dispatchEvent(new Event("change"));
    found.push(parts());
  }
  return found;
"""

COMPARE = """
  const boxes = [...document.querySelectorAll(".tick input")], panel = document.getElementById("compared");
  const drawn = part => [...part.querySelectorAll(".chart")].map(chart => chart.querySelectorAll("polyline").length);
  boxes[0].click();
  const one = drawn(panel);
  boxes[3].click();
  const texts = row => [...row.cells].map(cell => cell.textContent);
  const rows = [...panel.querySelectorAll(".differing tbody tr")].map(texts);
  const both = drawn(panel);
  document.querySelectorAll(".filtered .show")[1].click();
  const shown = drawn(document.querySelector(".made"));
  const made = document.querySelector(".made dd").textContent;
  document.querySelectorAll(".filtered th button")[4].click();  // a sort closes what is shown
  return {one, both, shown, rows, made, left: document.querySelectorAll(".made").length};
"""

NARROW = """
  const out = [...document.querySelectorAll("#tables td, #tables th, figure")].filter(
    part => part.getBoundingClientRect().right > innerWidth);
  const cells = [...document.querySelectorAll("#tables td")], titled = cells.filter(cell => cell.dataset.title);
  const shown = [getComputedStyle(titled[1], "::before").content, getComputedStyle(titled[1]).textAlign];
  return [innerWidth, out.length, document.documentElement.scrollWidth <= innerWidth, ...shown];
"""


def test_a_click_on_a_title_sorts(tmp_path):
    answer = in_browser(tmp_path, real_page(tmp_path), SORT)
    assert answer["complaints"] == []
    assert answer["found"] == [
        [[None, "ascending"], ["set9", "b", "set10", "a"]],  # by number; what has none comes last
        [[None, "descending"], ["set10", "b", "set9", "a"]],
        [["ascending", None], ["a", "b", "set9", "set10"]],  # by text, numbers in it as numbers
        [["descending", None], ["set10", "set9", "b", "a"]],
    ]


def test_a_name_in_the_legend_hides_its_line(tmp_path):
    answer = in_browser(tmp_path, real_page(tmp_path), CHARTS)
    assert answer["complaints"] == [] and answer["loaded"] == []
    assert answer["found"] == {"before": [True, True], "hidden": [True, False], "pressed": "false"}


def test_runs_are_filtered_by_method(tmp_path):
    answer = in_browser(tmp_path, real_page(tmp_path), FILTER)
    assert answer["found"] == [4, 2, ["every method", "L2", "DELTA"]] and answer["complaints"] == []


def test_the_whole_page_is_filtered(tmp_path):
    """Two leaderboards of two methods and two groups of curves: those of one data set, and of one method in them."""
    made = [
        record(method, 0, dataset__name=name, run_id=f"{name}-{method}", titles={})
        for name in ("cars", "dogs")
        for method in ("l2", "delta")
    ]
    comparison = compare(read_back(tmp_path, made, {r["run_id"]: log([2.0, 1.0]) for r in made}))
    answer = in_browser(tmp_path, page(leaderboards(comparison, "l2"), comparison, [], never), FILTER_PLACES)
    assert answer["complaints"] == []
    assert answer["found"] == [
        "details details h3 h3 table table tr tr tr tr",
        "details h3 table tr tr",
        "details h3 table tr",
        "details details h3 h3 table table tr tr",
    ]


def test_runs_are_compared_by_their_curves_and_settings(tmp_path):
    answer = in_browser(tmp_path, real_page(tmp_path), COMPARE)
    assert answer["complaints"] == []
    found = answer["found"]
    assert (found["one"], found["both"], found["shown"], found["left"]) == ([1], [2], [1], 0)
    assert found["made"] == record("l2", 1)["run_id"]
    assert {row[0]: [cell.strip("● ") for cell in row[1:]] for row in found["rows"]} == {
        "reg.alpha": ["–", "0.01"],
        "reg.beta": ["–", "0.01"],
        "reg.name": ["l2", "delta"],
        "reg.weight_decay": ["0.0001", "–"],
        "seed": ["0", "1"],
    }


def test_a_narrow_screen_shows_every_column(tmp_path):
    page_of = three_methods(finished="2026-11-21T23:26:00+0100")
    comparison = compare(read_back(tmp_path, page_of, {r["run_id"]: log([2.0, 1.0]) for r in page_of}))
    answer = in_browser(tmp_path, page(leaderboards(comparison, "l2"), comparison, [], never), NARROW, width=500)
    assert answer["found"] == [500, 0, True, '"mean ± std "', "left"]


def test_no_address_outside_the_page(tmp_path):
    records = [record("l2", seed) for seed in range(2)]
    found = read_back(tmp_path, records, {r["run_id"]: log([2.0, 1.0]) for r in records})
    text = page([], compare(found), [], never)
    assert not re.search(r"//[\w-]+\.\w|@import|url\(", text)


def test_the_data_of_many_runs_stay_small(tmp_path):
    """Curves are thinned, steps that runs share are there once, and so is each value of a setting."""
    made = [record("delta", seed, alpha=alpha) for alpha in (0.1, 0.01) for seed in range(60)]
    found = read_back(tmp_path, made, {r["run_id"]: log([1 / (i + 1) for i in range(500)]) for r in made})
    comparison = compare(found)
    frames = {
        id(run["config"]): frame for group in curves_of(comparison, never) for one in group for run, frame in one.each
    }
    data = curves_and_settings([run for row in comparison.rows for run in row.cells["delta"].runs], frames)
    assert len(data["steps"]) == 1 and len(data["steps"][0]) <= MOST_POINTS
    assert dict(data["keys"])["reg.alpha"] == ["0.01", "0.1"] and len(data["settings"]) == len(data["curves"]) == 120


def test_a_page_of_many_runs_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(page_runs, "ALL_POINTS", 12 * FEWEST_POINTS)
    made = [record("delta", seed, alpha=float(a), test_top1=50.0 + a) for a in range(1, 16) for seed in range(2)]
    found = read_back(tmp_path, made, {r["run_id"]: log([1 / (i + 1) for i in range(99)]) for r in made})
    comparison = compare(found)
    every = curves_of(comparison, never)
    [group] = learning_curves(comparison, every)
    assert [key.label for key in group.keys] == [f"DELTA, alpha={a}.0" for a in range(6, 16)]  # the leaders
    assert len(lines_of(group.charts[0][1])) == MAX_LINES and " 5 " in group.remarks[0]
    logs, left_out = drawn_runs(comparison, every)
    kept = [run for run in found if id(run["config"]) in logs]
    assert {run["config"]["reg"]["alpha"] for run in kept} == {float(a) for a in range(10, 16)}
    assert (len(logs), left_out) == (12, 18)
    assert all(len(curve["loss"][1]) == FEWEST_POINTS for curve in curves_and_settings(kept, logs)["curves"])


def test_words_that_runs_share_are_there_once(tmp_path):
    made = [record("delta", s, command="delta-run -m seed=0,1", overrides=[f"seed={s}", "reg=delta"]) for s in range(2)]
    data = how_made([*made, record("l2", device=None, overrides=None, versions=None)])
    assert len(set(data["texts"])) == len(data["texts"])

    def words(places):
        return (
            places
            if places is None
            else [data["texts"][i] for i in places]
            if isinstance(places, list)
            else (data["texts"][places])
        )

    first, _, last = ({name: words(one) for name, one in zip(data["about"], run, strict=True)} for run in data["made"])
    assert first["run"] == made[0]["run_id"] and first["overrides"] == ["seed=0", "reg=delta"]
    assert data["made"][0][1] == data["made"][1][1] and first["command"] == made[0]["command"]
    assert (last["device"], last["overrides"], last["versions"]) == (None, None, None)


def test_what_a_person_wrote_does_not_run(tmp_path):
    script = "return [typeof hacked, document.querySelector('.legend button').textContent, document.images.length];"
    answer = in_browser(tmp_path, evil_page(tmp_path), script)
    assert answer["found"][0] == "undefined" and "<script>hacked" in answer["found"][1]
    assert answer["found"][2] == 1  # the picture itself
    assert answer["complaints"] == []

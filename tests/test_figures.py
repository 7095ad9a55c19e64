"""The figures of delta-report on synthetic records: what is drawn is what was recorded."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from delta_transfer.common.errors import UserError
from delta_transfer.common.style import STYLES
from delta_transfer.records.files import write_figure
from delta_transfer.reporting import figures, logs
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.curve_figures import learning_curves
from delta_transfer.reporting.drawing import COLUMN, INTERVAL, Style, our_look
from delta_transfer.reporting.figures import write_figures
from delta_transfer.reporting.interval_figures import SWEEPS, against_setting, differences, intervals
from delta_transfer.reporting.logs import curves_of

from .test_report import record

ALPHA, BETA, LABELS = SWEEPS


def test_progress_is_shown_while_figures_are_drawn(tmp_path, caplog, monkeypatch):
    made = compare([run(tmp_path, method, 0, log([3.0, 2.0])) for method in ("l2", "delta")])
    caplog.set_level("INFO", "delta_transfer")
    for seconds in (60.0, 0.0):
        for module in (figures, logs):
            monkeypatch.setattr(module, "QUIET", seconds)
        write_figures(made, tmp_path / "figures", pytest.fail)
        shown = [line for line in caplog.messages if " 0/" in line]
        assert len(shown) == (0 if seconds else 2)  # runs that are read, and figures


def run(folder, method, seed, lines, **changes):
    """A record whose metrics.jsonl has `lines`; none if they are None."""
    made = record(method, seed, **changes)
    made["folder"] = folder / made["run_id"]
    made["folder"].mkdir(parents=True)
    if lines is not None:
        (made["folder"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def log(losses, penalties=None, top1=None, every=10):
    lines = [{"step": every * (i + 1), "lr": 0.01, "cross_entropy": 9.0, "loss": loss} for i, loss in enumerate(losses)]
    for line, value in zip(lines, penalties or [], strict=False):
        line["feature_maps"] = value
    for line, value in zip(lines, top1 or [], strict=False):
        line["test_top1"] = value
    return lines


def curves(comparison, warn):
    return learning_curves(comparison, curves_of(comparison, warn), warn)


def drawn(figure):
    """{label of the vertical axis: {label: (x, y)}}"""
    content = {}
    for axes in figure.axes:
        lines = [line for line in axes.lines if not line.get_label().startswith("_")]
        lines += [c[0] for c in axes.containers]  # of error bars
        labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
        labels += [c.get_label() for c in axes.containers]
        xy = {label: ([*line.get_xdata()], [*line.get_ydata()]) for label, line in zip(labels, lines, strict=True)}
        content[axes.get_ylabel().replace("\n", " ").removesuffix(f", {INTERVAL}")] = xy
    return content


def bars(container):
    """(low, high) of each error bar."""
    return [tuple(float(end) for end in segment[:, 1]) for segment in container[2][0].get_segments() if len(segment)]


def texts(figure):
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def only(named):
    ((stem, figure),) = named
    return stem, figure


# ---- learning curves -------------------------------------------------------------------------------------


def test_curves_are_means_over_seeds(tmp_path):
    records = [
        run(tmp_path, "l2", 0, log([4, 2], top1=[50, 60])),
        run(tmp_path, "l2", 1, log([2, 1], top1=[54, 66])),
        run(tmp_path, "delta", 0, log([8, 6], [5, 0.01], top1=[70, 71])),
    ]
    warnings = []
    stem, figure = only(curves(compare(records), warnings.append))
    assert stem == "curves-cub-resnet18" and warnings == []
    assert drawn(figure) == {
        "Training loss": {"L2": ([10, 20], [3, 1.5]), "DELTA": ([10, 20], [8, 6])},
        "Penalty: feature maps": {"DELTA": ([10, 20], [5, 0.01])},  # which L2 does not have
        "Test top-1 accuracy (%)": {"L2": ([10, 20], [52, 63]), "DELTA": ([10, 20], [70, 71])},
    }
    accuracy, loss, penalty = figure.axes  # what counts stands first
    assert all(axes.get_ylabel().replace("\n", " ").endswith(INTERVAL) for axes in figure.axes)
    assert (loss.get_yscale(), penalty.get_yscale()) == ("linear", "log")
    (band,) = loss.collections  # a single run has none
    heights = {(x, round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    half = 12.706205  # the t quantile of 0.975 with 1 degree of freedom, from a table, times 2^0.5 / 2^0.5
    assert {(10, round(3 - half, 4)), (10, round(3 + half, 4))} <= {(x, round(y, 4)) for x, y in heights}
    assert loss.get_ylim()[1] < 8 + half / 2  # which does not flatten the lines
    assert "95 % t interval" in texts(figure) and "n = 1 to 2; none for n = 1" in texts(figure)


def test_curves_keep_to_the_steps_that_all_seeds_share(tmp_path):
    records = [
        run(tmp_path, "l2", 0, log([6, 4, 2], top1=[50, None, 60])),
        run(tmp_path, "l2", 1, log([4, 0], every=20)),
    ]
    warnings = []
    _, figure = only(curves(compare(records), warnings.append))
    assert drawn(figure) == {"Training loss": {"L2": ([0], [4])}}  # at step 20 alone: one point
    assert figure.axes[0].get_xticklabels()[0].get_text() == "20"
    assert warnings == ["Learning curves: CUB-200-2011, resnet18: no step at which all runs of L2 have test_top1"]


def test_missing_and_damaged_files_are_named(tmp_path):
    records = [run(tmp_path, "l2", 0, log([4, 2])), run(tmp_path, "l2", 1, None), run(tmp_path, "l2", 2, log([1, 1]))]
    damaged = records[2]["folder"] / "metrics.jsonl"
    damaged.write_text('{"step": 10, "loss": 1}\nrubbish\n')
    warnings = []
    _, figure = only(curves(compare(records), warnings.append))
    assert drawn(figure)["Training loss"] == {"L2": ([10, 20], [4, 2])}
    assert len(warnings) == 2 and f"{damaged}, line 2" in warnings[0]
    assert records[1]["run_id"] in warnings[1]
    assert "n = 1" in texts(figure)


def test_every_setting_of_a_method_is_drawn_up_to_six(tmp_path):
    alphas = [10.0**-k for k in range(8)]
    records = [run(tmp_path, "delta", 0, log([a, a]), top1=100 * a, alpha=a) for a in alphas]
    warnings = []
    _, figure = only(curves(compare(records), warnings.append))
    # The first ones by alpha, not the best ones.
    assert [*drawn(figure)["Training loss"]] == [f"DELTA, alpha={a}" for a in sorted(alphas)[:6]]
    assert warnings == ["learning curves of CUB-200-2011, resnet18: only the first 6 of 8 settings of DELTA"]
    fills = {(line.get_color(), line.get_fillstyle()) for line in figure.axes[0].lines}
    assert len(fills) == 6


# ---- accuracy against a setting --------------------------------------------------------------------------


def test_accuracy_against_alpha():
    values = {0.0: [50, 52], 0.01: [60, 64], 0.1: [58]}
    records = [record("l2_sp", s, v, alpha=a) for a, vs in values.items() for s, v in enumerate(vs)]
    records += [record("l2"), record("delta", alpha=0.1)]  # no value, and only one
    warnings = []
    stem, figure = only(against_setting(compare(records), ALPHA, warnings.append))
    assert (stem, warnings) == ("alpha-cub-resnet18", [])
    ((label, (x, y)),) = drawn(figure)["Test top-1 accuracy (%)"].items()
    assert (label, y) == ("L2-SP", [51, 62, 58])
    assert x == pytest.approx([0.001, 0.01, 0.1])  # 0 has no place on a logarithmic axis: left of a break
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.01", "0.1"]
    assert [text.get_text() for text in axes.texts] == ["//"]
    (container,) = axes.containers
    t = 12.706205  # the quantile of 0.975 with 1 degree of freedom; the intervals are 51 ± t and 62 ± 2 t
    assert bars(container) == [pytest.approx((51 - t, 51 + t)), pytest.approx((62 - 2 * t, 62 + 2 * t))]
    low, high = axes.get_ylim()
    assert low < 62 - 2 * t and high > 62 + 2 * t
    assert "none for n = 1" in texts(figure) and "not for choosing" in texts(figure)


def test_settings_that_differ_otherwise_make_another_line():
    records = [record("delta", 0, 50 + a + s, alpha=a, backbone__image_size=s) for a in (1, 2) for s in (160, 224)]
    records += [record("delta", 0, 70, alpha=3, backbone__image_size=96)]  # alone at its size
    _, figure = only(against_setting(compare(records), ALPHA, pytest.fail))
    assert drawn(figure)["Test top-1 accuracy (%)"] == {
        "DELTA, backbone.image_size=160": ([1, 2], [211, 212]),
        "DELTA, backbone.image_size=224": ([1, 2], [275, 276]),
    }


def test_values_that_never_differ_alone_are_said():
    records = [record("delta", alpha=1, schedule__lr=0.1), record("delta", alpha=2, schedule__lr=0.2)]
    warnings = []
    assert against_setting(compare(records), ALPHA, warnings.append) == []
    assert len(warnings) == 1 and "no two settings of DELTA differ in reg.alpha alone" in warnings[0]


def drawn_from_each_class(n, top1, **changes):
    return record("l2", 0, top1, n_train=10 * n, num_classes=10, **changes)


def test_accuracy_against_the_training_images_however_they_were_drawn():
    rates = {"dataset__images_per_class": None}
    records = [drawn_from_each_class(n, 50 + n, dataset__sample_rate=n / 40, **rates) for n in (10, 20, 40)]
    stem, figure = only(against_setting(compare(records), LABELS, pytest.fail))
    assert stem == "labels-cub-resnet18"
    found = drawn(figure)["Test top-1 accuracy (%)"]
    assert found["L2"] == ([10, 20, 40], [60, 70, 90])
    counts = [drawn_from_each_class(n, 50 + n, dataset__images_per_class=n) for n in (5, 10)]
    everything = drawn_from_each_class(20, 80, **rates)
    _, figure = only(against_setting(compare([*counts, everything]), LABELS, pytest.fail))
    assert drawn(figure)["Test top-1 accuracy (%)"]["L2"] == ([5, 10, 20], [55, 60, 80])


def test_other_images_are_another_line():
    others = {n: {"dataset__images_per_class": n, "dataset_fingerprint": f"{n}" * 64} for n in (5, 9)}
    records = [drawn_from_each_class(n, 50, **changes) for n, changes in others.items()]
    warnings = []
    assert against_setting(compare(records), LABELS, warnings.append) == []
    assert len(warnings) == 1


# ---- intervals -------------------------------------------------------------------------------------------


def test_differences_with_their_intervals_the_best_first_and_an_outlier_at_the_edge():
    l2 = [50.0, 52.0, 54.0]
    plus = {"delta": [0.9, 1.0, 1.1], "afa": [2.0, 0.5, 1.0], "bss": [0.1, -0.2, 0.1], "rifle": [-30.0, -31.0, -32.0]}
    records = [record("l2", s, v) for s, v in enumerate(l2)]
    records += [record(m, s, l2[s] + v) for m, values in plus.items() for s, v in enumerate(values)]
    stem, figure = only(differences(compare(records), "l2"))
    assert stem == "differences-cub-resnet18"
    (axes,) = figure.axes
    assert "L2" in axes.get_xlabel()  # a paper has its own title
    assert [label.get_text() for label in axes.get_yticklabels()] == ["AFA", "DELTA", "bss", "rifle"]
    means = [
        line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata()) == 1
    ]
    assert axes.get_xlim()[0] > -30 and any(mean == pytest.approx(1.0) for mean in means)
    markers = {line.get_marker(): line for line in axes.lines}
    assert (
        "<" in markers
        and markers["v"].get_markerfacecolor() != "white"
        and markers["P"].get_markerfacecolor() == "white"
    )
    assert differences(compare([record("l2", 0)]), "l2") == []


def test_intervals_of_the_mean():
    records = [*(record("l2", s, v) for s, v in enumerate([50.0, 52.0, 54.0])), record("delta", 0, 57.4)]
    stem, figure = only(intervals(compare(records)))
    (axes,) = figure.axes
    l2, delta = axes.containers
    assert stem == "intervals-cub-resnet18"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["L2", "DELTA"]
    ((low, high),) = [segment[:, 0] for segment in l2[2][0].get_segments()]
    half = 4.302653 * 2 / math.sqrt(3)  # t quantile of 0.975 with 2 degrees of freedom, from a table
    assert (low, high) == (pytest.approx(52 - half, abs=1e-4), pytest.approx(52 + half, abs=1e-4))
    assert (list(delta[0].get_xdata()), delta[2]) == ([57.4], ())
    dots = [list(line.get_xdata()) for line in axes.lines if line.get_markersize() == 2]
    assert dots == [[50, 52, 54]]
    assert [text.get_text() for text in axes.texts] == ["52.0 (3)", "57.4 (1)"]
    assert axes.get_xlim()[0] > 0 and "does not start at 0" in texts(figure)


def test_a_method_that_fails_does_not_stretch_the_axis_of_accuracies():
    spread = {"l2": 50.0, "l2_sp": 51.0, "delta": 52.0, "rifle": 20.0}
    records = [record(method, s, value + s) for method, value in spread.items() for s in range(3)]
    _, figure = only(intervals(compare(records)))
    (axes,) = figure.axes
    assert axes.get_xlim()[0] > 35 and "<" in {line.get_marker() for line in axes.lines}
    assert [text.get_text() for text in axes.texts][-1] == "21.0 (3)"


def test_intervals_that_begin_at_zero_do_not_say_otherwise():
    _, figure = only(intervals(compare([record("l2", s, v) for s, v in enumerate([1.0, 30.0])])))
    assert figure.axes[0].get_xlim()[0] == 0 and "start" not in texts(figure)


def test_folds_are_said():
    records = [record("l2", 0, val_top1=50.0 + f, split__folds=3, split__fold=f) for f in range(3)]
    _, figure = only(intervals(compare(records, "val_top1")))
    assert "over folds" in texts(figure)
    assert figure.axes[0].get_xlabel() == f"Validation top-1 accuracy (%), {INTERVAL}"


# ---- all of them -----------------------------------------------------------------------------------------


def some_records(folder):
    made = [run(folder, "l2", s, log([4, 2 + s], top1=[50, 60 + s]), top1=60.0 + s) for s in range(2)]
    for alpha in (0.001, 0.01):
        made += [run(folder, "delta", s, log([5, 3], [1, 2]), top1=61.0 + s, alpha=alpha) for s in range(2)]
    return made


def test_a_method_looks_the_same_in_every_figure(tmp_path):
    comparison = compare(some_records(tmp_path))
    made = [*curves(comparison, print), *against_setting(comparison, ALPHA, print), *intervals(comparison)]
    looks = set()
    for _, figure in made:
        lines = [c[0] for axes in figure.axes for c in axes.containers] + [
            a for axes in figure.axes for a in axes.lines
        ]
        looks |= {(to_rgb(a.get_color()), a.get_marker()) for a in lines if a.get_label().startswith("L2")}
    assert len(made) == 3
    assert looks == {(to_rgb(STYLES["l2"].colour), STYLES["l2"].marker)}


@pytest.mark.parametrize("style", [None, Style(paper=True), Style(caption=False)])
@pytest.mark.parametrize("name", ["short", "a_long_name_" * 5])
def test_nothing_lies_on_anything_else(tmp_path, name, style):
    records = some_records(tmp_path)
    for made in records[2:4]:  # of DELTA
        made["config"]["reg"]["option_of_" + name] = name
    for alpha in (0.1, 1):
        records.append(run(tmp_path, "delta", 0, log([5, 3], [1, 2]), alpha=alpha))
    comparison = compare(records)
    with our_look(style):
        made = [*curves(comparison, print), *against_setting(comparison, ALPHA, print), *intervals(comparison)]
    assert len(made) == 3
    for _, figure in made:
        assert style is None or not style.paper or figure.get_figwidth() == COLUMN
        assert style is None or style.caption or not texts(figure).strip()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
        boxes += [artist.get_window_extent(renderer) for artist in [*figure.texts, *figure.legends]]
        for i, box in enumerate(boxes):
            assert min(box.x0, box.y0) >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            for other in boxes[:i]:
                assert min(box.x1, other.x1) - max(box.x0, other.x0) <= 1 or (
                    min(box.y1, other.y1) - max(box.y0, other.y0) <= 1
                )


def test_files(tmp_path):
    records = some_records(tmp_path)[:2]
    records += [record("l2", 0, dataset__name="a/b $x_$", folder=tmp_path / "absent")]
    records += [record("l2", 1, precision="x", folder=tmp_path / "absent", dataset__name="a/b $x_$", schedule__lr=1)]
    warnings, folder = [], tmp_path / "new" / "figures"
    before = dict(matplotlib.rcParams)
    paths = write_figures(compare(records), folder, warnings.append, "l2")
    assert dict(matplotlib.rcParams) == before
    stems = ["curves-cub-resnet18", "intervals-a_b_x__-resnet18-1"]
    stems += ["intervals-a_b_x__-resnet18-2", "intervals-cub-resnet18"]
    assert [path.name for path in paths] == [f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")]
    assert sorted(path.name for path in folder.glob("*.p*")) == sorted(path.name for path in paths)
    assert len(warnings) == 1


def test_a_dot_in_a_name_belongs_to_it(tmp_path):
    figures = [write_figure(Figure(figsize=(1, 1)), tmp_path / f"b0.ra_in1k-stage{stage}") for stage in (1, 2)]
    assert [path.name for path in figures[1]] == ["b0.ra_in1k-stage2.png", "b0.ra_in1k-stage2.pdf"]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        write_figures(compare([record("l2", folder=tmp_path)]), tmp_path / "file", print)


def test_the_same_records_give_the_same_bytes(tmp_path):
    """In another process, with other hashes of strings and at another time."""
    code = """
import sys
from pathlib import Path
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.figures import write_figures
from tests.test_figures import some_records
folder = Path(sys.argv[1])
write_figures(compare(some_records(folder / "runs")[:2]), folder / "figures", print)
"""
    paths = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": paths, "SOURCE_DATE_EPOCH": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], env=env, check=True)
    write_figures(compare(some_records(tmp_path / "here" / "runs")[:2]), tmp_path / "here" / "figures", print)
    here, there = (
        {path.name: path.read_bytes() for path in (tmp_path / place / "figures").glob("*.p*")}
        for place in ("here", "there")
    )
    assert len(here) == 4 and here == there

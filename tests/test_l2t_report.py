"""Runs that transfer between networks (L2T-ww and its baselines): their tables, matching figures, saliency maps."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from delta_transfer import report
from delta_transfer.cli import case_study
from delta_transfer.inspect.case_study import renormalised
from delta_transfer.inspect.image_maps import saliency
from delta_transfer.models.zoo import BackboneConfig, build_source
from delta_transfer.records import reading as runs
from delta_transfer.reporting import page, sections
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.curve_figures import matching_figures
from delta_transfer.reporting.figures import write_figures
from delta_transfer.reporting.logs import curves_of
from delta_transfer.reporting.page_charts import matched_amounts
from delta_transfer.reporting.published import against

from .miniature import delta_run
from .test_report import record

TINY = [{"name": "resnet32", "network": "resnet32", "weights_fingerprint": "a" * 64, "taps": ["layer1", "layer2"]}]
BOTH = [*TINY, {"name": "resnet34", "network": "resnet34", "weights_fingerprint": "b" * 64, "taps": ["layer1"]}]


def moved(method, seed=0, top1=50.0, sources=TINY, **changes):
    """A record of a VGG-9 from random weights; `sources` None: without any."""
    about = {"backbone__name": "vgg9_bn", "backbone__weights": "none", "weights_fingerprint": "none"}
    made = record(method, seed, top1, **about | {"run_id": f"{method}-{len(sources or [])}-{seed}"} | changes)
    made["config"]["source"] = [source["name"] for source in sources] if sources else None
    return made | ({"sources": sources} if sources else {})


def scratch(seed=0, top1=40.0, **changes):
    return moved("scratch", seed, top1, sources=None, **changes)


def save(folder, records):
    for one in records:
        run = folder / "runs" / one["run_id"]
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps(one))
    return str(folder)


# ---- tables ----------------------------------------------------------------------------------------------


def test_scratch_stands_beside_every_source_that_others_of_its_settings_had():
    runs = [scratch(0), scratch(1), moved("l2t_ww", 0), moved("lwf", 0, sources=BOTH)]
    runs += [scratch(0, schedule__iterations=9, run_id="short")]
    made = compare(runs)
    assert [(row.backbone, {m: cell.n for m, cell in row.cells.items()}) for row in made.rows] == [
        ("resnet32 + resnet34 -> vgg9_bn", {"scratch": 2, "lwf": 1}),
        ("resnet32 -> vgg9_bn", {"scratch": 2, "l2t_ww": 1}),
        ("vgg9_bn (random weights)", {"scratch": 1}),
    ]
    assert made.warnings == [] and made.transfers


def test_a_run_in_several_rows_is_counted_once(tmp_path):
    records = [scratch(0), scratch(1), moved("l2t_ww", 0), moved("lwf", 0, sources=BOTH)]
    save(tmp_path, records)
    made = compare([runs.read(folder) for folder in sorted((tmp_path / "runs").iterdir())])
    assert sum(cell.n for row in made.rows for cell in row.cells.values()) == 6
    counts = {row[0].text: row[-1].text for row in sections.costs(made).rows}
    assert counts == {"Scratch": "2", "LwF": "1", "L2T-ww": "1"}
    assert "4 runs of 3 methods on 1 data set" in page.page([], made, [], lambda _: None)


def test_sources_of_one_name_and_other_weights_are_other_rows():
    other = [TINY[0] | {"weights_fingerprint": "c" * 64}]
    made = compare([scratch(), moved("l2t_ww"), moved("l2t_ww", sources=other, run_id="other")])
    assert [(row.settings, set(row.cells)) for row in made.rows] == [
        ("source=resnet32 aaaaaaaa", {"scratch", "l2t_ww"}),
        ("source=resnet32 cccccccc", {"scratch", "l2t_ww"}),
    ]


def test_columns_come_in_the_papers_order():
    names = ["scratch", "lwf", "at", "lwf_at", "fm", "lwf_fm", "l2t_w", "l2t_ww"]
    assert compare([moved(name) for name in reversed(names)]).methods == names


def test_transfer_never_stands_in_a_table_of_fine_tuning(tmp_path, capsys):
    tuned = [
        record(m, s, 80.0 + s, backbone__name="vgg9_bn", run_id=f"{m}{s}") for m in ("l2", "delta") for s in (0, 1)
    ]
    folder = save(
        tmp_path, [*tuned, *(scratch(s, 40.0 + s) for s in (0, 1)), *(moved("l2t_ww", s, 50.0) for s in (0, 1))]
    )
    assert report.main([folder, "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    titles = [line.strip("*") for line in text.splitlines() if line.startswith("**")]
    assert "vgg9_bn: " in titles[0] and "random weights" not in titles[0]
    assert "resnet32 -> vgg9_bn: " in titles[1] and "of targets trained from random weights" in titles[1]
    tables = text.split("**")[2::2]
    assert "difference to L2" in tables[0] and "difference to Scratch" in tables[1]
    assert "DELTA" in tables[0] and "Scratch" not in tables[0] and "random" not in tables[0]
    assert "DELTA" not in tables[1]

    assert report.main([folder, "--format", "csv"]) == 0
    answer = capsys.readouterr()
    assert {row["method"] for row in csv.DictReader(io.StringIO(answer.out))} == {"l2", "delta"}
    assert "left out: 4 runs that transfer between networks" in answer.err and "(--transfer)" in answer.err
    assert report.main([folder, "--format", "csv", "--transfer"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["method"], row["difference"]) for row in rows] == [("scratch", ""), ("l2t_ww", "9.5")]

    assert report.main([folder, "--baseline", "delta", "--format", "markdown"]) == 0
    assert "ifference to Scratch" not in capsys.readouterr().out
    assert report.main([folder, "--baseline", "fm"]) == 1
    assert "only of l2, delta, scratch, l2t_ww" in capsys.readouterr().err


def test_transfer_runs_that_are_all_verifications_need_no_metric(tmp_path, capsys):
    """Classification runs that fine-tune do not stand in their way, and are not shown."""
    pairs = {"test_top1": None, "test_pair_accuracy": 80.0, "test_auc": 0.9}
    folder = save(tmp_path, [record("delta"), record("l2", run_id="tuned", **pairs), scratch(**pairs)])
    assert report.main([folder, "--transfer", "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "test pair accuracy (%)" in text and "top-1" not in text
    assert "Scratch" in text and "L2" not in text and "DELTA" not in text
    fine_tuned = save(tmp_path / "tuned", [record("delta"), record("l2", run_id="tuned", **pairs)])
    assert report.main([fine_tuned, "--transfer"]) == 1
    assert "no finished runs that transfer between networks" in capsys.readouterr().err


def test_settings_are_chosen_for_both_kinds_of_runs(tmp_path, capsys):
    def held_out(one, value, *overrides):
        one["config"]["split"]["val_fraction"] = 0.2
        return one | {"test_top1": None, "val_top1": value, "val_loss": 1.0, "overrides": list(overrides)}

    runs = [held_out(scratch(), 40.0, "reg=scratch")]
    for sources in (TINY, BOTH):
        for alpha, value in ((0.1, 50.0), (1.0, 55.0)):
            name = f"{alpha}-{len(sources)}"
            runs += [
                held_out(moved("fm", sources=sources, alpha=alpha, run_id=name), value, "reg=fm", f"source={name}")
            ]
    runs += [held_out(record("l2"), 70.0, "reg=l2")]
    folder = save(tmp_path, runs)
    assert report.main([folder, "--select", "val", "--emit-overrides"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert [line.split()[2:4] for line in commands] == [
        ["reg=l2", "seed='range(5)'"],
        ["reg=scratch", "seed='range(5)'"],  # once, though it stands beside two sources
        ["reg=fm", "source=1.0-2"],
        ["reg=fm", "source=1.0-1"],
    ]


def test_published_numbers_of_transfer_stand_beside_transfer_alone(tmp_path, capsys):
    cifar = {"dataset__name": "cifar10", "backbone__image_size": 32}
    about = {"num_classes": 10, "n_train": 500, "n_test": 10000}
    (match,) = against(compare([moved("l2t_ww", 0, 60.0, **cifar) | about]), "l2t_ww")
    assert match.number.mean == 64.91 and match.differing == []
    cub = {"backbone__name": "resnet18"}
    folder = save(tmp_path, [record("l2"), moved("lwf_at", 0, 58.0, **cub)])
    assert report.main([folder, "--against", "l2t_ww", "--format", "markdown"]) == 0
    answer = capsys.readouterr()
    assert "58.9" in answer.out and "| L2 " not in answer.out and "left out: 1 runs of fine-tuning" in answer.err
    assert report.main([folder, "--against", "paper", "--format", "markdown"]) == 0
    answer = capsys.readouterr()
    assert "LwF" not in answer.out and "(--against l2t_ww)" in answer.err


# ---- matching figures ------------------------------------------------------------------------------------


def logged(folder, made, pairs, rows):
    """The record with its folder, and metrics.jsonl of `rows`, {step: amounts of the pairs}."""
    run = folder / made["run_id"]
    run.mkdir(parents=True)
    beside = {"lr": 0.1, "loss": 1.0, "attention_entropy": 0.9, "attention_meta_loss": 2.0}
    lines = [{"step": step, **beside, **dict(zip(pairs, values, strict=True))} for step, values in rows.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made | {"folder": run}


def drawn(draw, comparison):
    return draw(comparison, curves_of(comparison, lambda _: None))


def test_amounts_at_the_end_and_over_training_are_drawn_pair_by_pair(tmp_path):
    pairs = [f"attention_resnet32/{m}>{n}" for m in ("layer1", "layer2") for n in ("a/conv", "b")]
    pairs += ["attention_resnet34/layer1>b"]
    runs = [
        logged(tmp_path, moved("l2t_ww", 0, sources=BOTH), pairs, {10: [1, 1, 1, 1, 1], 20: [0, 2, 3, 4, 5]}),
        logged(tmp_path, moved("l2t_ww", 1, sources=BOTH), pairs, {10: [1, 1, 1, 1, 1], 20: [1, 2, 3, 4, 6]}),
    ]
    ((stem, figure),) = drawn(matching_figures, compare(runs))
    assert stem == "matching-cub-resnet32_resnet34_vgg9_bn"
    maps = {axes.get_ylabel(): axes for axes in figure.axes if axes.images}
    assert set(maps) == {"Tap of resnet32", "Tap of resnet34"}
    first = maps["Tap of resnet32"]
    np.testing.assert_allclose(first.images[0].get_array(), [[0.5, 2], [3, 4]])
    assert [text.get_text() for text in first.texts] == ["0.50", "2.00", "3.00", "4.00"]
    assert [text.get_text() for text in first.get_xticklabels()] == ["a.conv", "b"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["layer1", "layer2"]
    assert {axes.images[0].get_clim() for axes in maps.values()} == {(0, 5.5)}  # colours mean the same in both
    panels = {axes.get_label(): axes for axes in figure.axes if not axes.images}
    assert len(panels) == len(pairs)
    np.testing.assert_allclose(panels["resnet34: layer1 > b"].lines[0].get_xydata(), [[10, 1], [20, 5.5]])
    np.testing.assert_allclose(panels["resnet32: layer2 > a.conv"].lines[0].get_xydata(), [[10, 1], [20, 3]])
    assert len({axes.get_ylim() for axes in panels.values()}) == 1
    caption = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "n = 2" in caption and "not how much a layer matters" in caption


def test_the_page_has_maps_and_curves_of_the_amounts(tmp_path):
    pairs = [f"attention_resnet32/{m}>{n}" for m in ("layer1", "layer2") for n in ("a/conv", "b&c")]
    pairs = [*pairs[:3], "attention_resnet34/layer1>b&c"]  # not all pairs
    runs = [
        logged(tmp_path, moved("l2t_ww", 0, sources=BOTH), pairs, {10: [1, 1, 1, 1], 20: [0, 2, 3, 4]}),
        logged(tmp_path, moved("l2t_ww", 1, sources=BOTH), pairs, {10: [1, 1, 1, 1], 20: [1, 2, 3, 6]}),
        logged(tmp_path, scratch(), [], {10: []}),
    ]
    (group,) = drawn(matched_amounts, compare(runs))
    assert group.title == "L2T-ww, CUB-200-2011, resnet32 + resnet34 -> vgg9_bn"
    assert [(key.label, key.n) for key in group.keys] == [("a.conv", 2), ("b&c", 2)]
    first, layer1, layer2, second, other = group.charts
    cells = re.findall(r'fill-opacity="(.*?)"><title>(.*?)</title>', first[1] + second[1])
    assert cells == [  # colours mean the same in both
        ("0.07", "layer1 > a.conv: 0.5"),
        ("0.28", "layer1 > b&amp;c: 2"),
        ("0.42", "layer2 > a.conv: 3"),
        ("0.70", "layer1 > b&amp;c: 5"),
    ]
    assert re.findall(r"<title>(.*?)</title>", layer1[1]) == [
        "a.conv at the end: 0.5 ± 6.4 (95 % interval)",
        "b&amp;c at the end: 2 ± 0 (95 % interval)",
    ]
    assert layer2[1].count("<polyline") == 1 and other[0] == "Amounts of layer1 of resnet34"
    text = page.page([], compare(runs), [], pytest.fail)
    assert '<a href="#matching">' in text
    assert 'id="matching"' not in page.page([], compare(runs[2:]), [], pytest.fail)


def test_pairs_that_are_none_are_empty(tmp_path):
    """One-to-one pairs of a network with its own kind, in a sum of regularizers."""
    pairs = ["attention_l2t_ww.layer1/1>layer1/1", "attention_l2t_ww.layer2/1>layer2/1"]
    made = logged(tmp_path, moved("mine", sources=None), pairs, {10: [1, 2]})
    ((_, figure),) = drawn(matching_figures, compare([made]))
    (map_,) = (axes for axes in figure.axes if axes.images)
    assert [text.get_text() for text in map_.texts] == ["1.00", "–", "–", "2.00"]
    assert map_.get_ylabel().replace("\n", " ") == "Tap of l2t_ww, source network" and len(figure.axes) == 3


def test_figures_of_matching_are_written_and_others_have_none(tmp_path):
    pairs = [f"attention_resnet32/layer{m}>group{n}" for m in range(3) for n in range(5)]
    runs = [logged(tmp_path, moved("l2t_ww"), pairs, {10: [1] * 15, 20: list(range(15))})]
    runs += [logged(tmp_path, moved("l2t_w"), [], {10: []}), logged(tmp_path, scratch(), [], {10: []})]
    written = [path.name for path in write_figures(compare(runs), tmp_path / "figures", lambda _: None)]
    assert [name for name in written if name.startswith("matching")] == [
        "matching-cub-resnet32_vgg9_bn.png",
        "matching-cub-resnet32_vgg9_bn.pdf",
    ]


# ---- case study ------------------------------------------------------------------------------------------


def small(weights="none", **changes) -> BackboneConfig:
    return BackboneConfig("small_resnet", weights, 32, 36, head="fc", **{"taps": ["layer2.1.conv2"]} | changes)


def test_saliency_is_the_slope_of_the_logit_where_it_is_steep():
    network = build_source(small(), seed=0).freeze()
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    classes, std = np.arange(9) % 5, [0.25, 0.5, 1.0]
    maps = saliency(network, images, classes, std)
    assert maps.shape == (9, 32, 32) and (maps.min(axis=(1, 2)) == 0).all() and (maps.max(axis=(1, 2)) == 1).all()
    # A pixel alone, by finite differences, beside one with the smallest slope; the blur is narrow.
    network, images = network.double(), images.double()
    for i in (0, 8):
        high, low = (np.unravel_index(pick(maps[i]), (32, 32)) for pick in (np.argmax, np.argmin))
        slopes = []
        for y, x in (high, low):
            changed = images[i].repeat(6, 1, 1, 1)
            for colour in range(3):
                changed[colour, colour, y, x] += 1e-5 / std[colour]
                changed[colour + 3, colour, y, x] -= 1e-5 / std[colour]
            logits = network(changed)["logits"][:, classes[i]]
            slopes.append((logits[:3] - logits[3:]).abs().max().item())
        assert slopes[0] > 2 * slopes[1]


@pytest.fixture(scope="module")
def glyph_runs(tmp_path_factory) -> dict[str, Path]:
    """A target from random weights alone and one that learns from a network of another kind and normalisation."""
    results = tmp_path_factory.mktemp("results")
    source = BackboneConfig("resnet32", "none", 32, 32, head="fc", taps=["layer3"])
    save_file(build_source(source, seed=1).weights(), results / "source.safetensors")
    common = [
        *("dataset=glyphs", "dataset.test_per_class=2", "backbone.weights=none", "device=cpu"),
        *("schedule.iterations=2", "schedule.batch_size=8", "schedule.lr=0.05", "schedule.eval_every=0"),
        *("schedule.log_every=1", f"results_dir={results}"),
    ]
    learning = ["reg=l2t_ww", "reg.alpha=1e-6", "reg.inner_steps=1", "seed=1"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert delta_run(monkeypatch, *common, "reg=scratch") == 0
        weights = results / "source.safetensors"
        assert delta_run(monkeypatch, *common, *learning, f"source=[resnet32:{weights}]") == 0
    return {folder.name.split("-")[2]: folder for folder in (results / "runs").iterdir()}


needs_grad_cam = pytest.mark.skipif("not __import__('importlib').util.find_spec('pytorch_grad_cam')")


@needs_grad_cam
def test_the_case_study_shows_what_was_learned_from_and_no_random_network(glyph_runs, tmp_path, monkeypatch, capsys):
    drawn = []
    write = case_study.write
    monkeypatch.setattr(case_study, "write", lambda figure, *rest: (drawn.append(figure), write(figure, *rest)))
    index = str(np.load(glyph_runs["scratch"] / "predictions.npz")["index"][3])
    command = [*map(str, (glyph_runs["scratch"], glyph_runs["l2t_ww"])), "--images", index, "--output", str(tmp_path)]
    assert case_study.main(command) == 0
    assert "began with random weights" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"chosen.png", "chosen.pdf", "chosen.txt"}
    heads = [text.get_text() for text in drawn[0].texts if "Grad-CAM" in text.get_text()]
    assert heads == [
        "source resnet32\nactivation  |  Grad-CAM  |  saliency, its own class",
        "Scratch, seed 0\nactivation  |  Grad-CAM  |  saliency, true class",
        "L2T-ww, seed 1\nactivation  |  Grad-CAM  |  saliency, true class",
    ]
    assert len(drawn[0].axes) == 1 + 3 * 3
    text = (tmp_path / "chosen.txt").read_text()
    assert "(layer3.1.conv2, layer3)" in text and "random weights" in text
    assert "gradient of the class's logit" in text and "0.5 pixels" in text


@needs_grad_cam
def test_without_any_source_only_targets_are_shown(glyph_runs, tmp_path):
    index = str(np.load(glyph_runs["scratch"] / "predictions.npz")["index"][0])
    assert case_study.main([str(glyph_runs["scratch"]), "--images", index, "--output", str(tmp_path)]) == 0
    assert "source network" not in (tmp_path / "chosen.txt").read_text()


def test_a_source_sees_images_with_its_own_normalisation():
    pixels = torch.rand(2, 3, 4, 4)
    of, to = small(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]), small(mean=[0.1, 0.2, 0.3], std=[1.0, 0.5, 0.25])
    seen = [(pixels - torch.tensor(b.mean).view(3, 1, 1)) / torch.tensor(b.std).view(3, 1, 1) for b in (of, to)]
    torch.testing.assert_close(renormalised(seen[0], of, to), seen[1])


def test_the_matching_of_a_real_run_is_drawn(glyph_runs):
    records = [runs.read(folder) for folder in glyph_runs.values()]
    ((_, figure),) = drawn(matching_figures, compare(records))
    (map_,) = (axes for axes in figure.axes if axes.images)
    assert map_.images[0].get_array().shape == (3, 3) and not np.isnan(map_.images[0].get_array()).any()
    assert [text.get_text() for text in map_.get_yticklabels()] == ["layer1", "layer2", "layer3"]

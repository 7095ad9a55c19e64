"""delta-report attention: numbers on hand-made weights, patches against brute force, what is said about damage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import nn

from delta_transfer.cli.attention import main
from delta_transfer.common.console import show_messages
from delta_transfer.common.errors import UserError
from delta_transfer.inspect.attention import (
    Attention,
    attention_of,
    distinct,
    heaviest,
    histograms,
    mass,
    names_of,
    normalised_entropy,
    overlap,
    overlap_table,
    weight_table,
)
from delta_transfer.inspect.patches import Place, ReceptiveFields, patch_figure, patch_figures, strongest
from delta_transfer.inspect.replay import replay
from delta_transfer.models import Network
from delta_transfer.models.frozen import frozen_maps
from delta_transfer.models.zoo import SmallResNet
from delta_transfer.records.reading import Damaged, read

from .conftest import randomise_batchnorm
from .miniature import delta_run, rewrite


def write_run(folder: Path, dataset="cub", backbone="net", source="a", seed=0, fit=None, changes=None, **importance):
    """A run's record and attention file; importances by tap, in the order of the backbone's taps."""
    run = folder / f"{dataset}-{backbone}-delta-s{seed}-0123abc{seed}"
    run.mkdir(parents=True)
    options = {"method": "exact", "images": 64, "temperature": 5.0} | (changes or {})
    config = {
        "dataset": {"name": dataset},
        "backbone": {"name": backbone, "taps": list(importance)},
        "reg": {"name": "delta", "attention": options},
    }
    record = {"run_id": run.name, "seed": seed, "config": config, "fit": fit or {}}
    (run / "summary.json").write_text(json.dumps(record))
    tensors = {tap: torch.as_tensor(v, dtype=torch.float32) for tap, v in importance.items()}
    save_file(tensors, run / "attention.safetensors", {"weights": json.dumps(source)})
    return run


def read_one(folder: Path, **arguments) -> Attention:
    return attention_of(read(write_run(folder, **arguments)))


# ---- weights ---------------------------------------------------------------------------------------------


def test_weights_of_small_values(tmp_path):
    weights = read_one(tmp_path, last=[0, 1, 2], first=[3, 3, 3, 3]).weights
    assert list(weights) == ["last", "first"]  # the backbone's order, not the file's
    np.testing.assert_allclose(weights["last"], [0.7673, 0.9803, 1.2524], atol=5e-5)
    np.testing.assert_array_equal(weights["first"], 1)


def test_the_temperature_is_the_record_s(tmp_path):
    weights = read_one(tmp_path, changes={"temperature": 1.0}, tap=[-1, 0, 1]).weights["tap"]
    exponential = np.exp(np.sqrt(1.5) * np.array([-1, 0, 1]))
    np.testing.assert_allclose(weights, 3 * exponential / exponential.sum(), rtol=1e-6)


def test_no_file_is_no_damage(tmp_path):
    run = write_run(tmp_path, tap=[0, 1])
    (run / "attention.safetensors").unlink()
    assert attention_of(read(run)) is None


def truncate(run: Path) -> None:
    whole = (run / "attention.safetensors").read_bytes()
    (run / "attention.safetensors").write_bytes(whole[:-3])


def replace_importance(value: list) -> object:
    return lambda run: save_file({"tap": torch.tensor(value)}, run / "attention.safetensors")


def forget_temperature(run: Path) -> None:
    record = json.loads((run / "summary.json").read_text())
    del record["config"]["reg"]["attention"]["temperature"]
    (run / "summary.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        replace_importance([0.0, float("nan")]),
        replace_importance([[0.0, 1.0]]),
        replace_importance([]),
        lambda run: save_file({"other": torch.ones(2)}, run / "attention.safetensors"),
        forget_temperature,
    ],
)
def test_damage_is_named(tmp_path, damage):
    run = write_run(tmp_path, tap=[0.0, 1.0])
    damage(run)
    with pytest.raises(Damaged, match=run.name):
        attention_of(read(run))


def test_heaviest_channels():
    weights = np.array([1, 3, 2, 3, 1, 2, 0.5])
    assert heaviest(weights, 3).tolist() == [1, 3, 2]  # among equals the lower index first
    assert heaviest(weights).tolist() == [1]  # 10 % of seven, at least one
    assert len(heaviest(np.ones(64))) == 6
    assert heaviest(weights, 100).tolist() == [1, 3, 2, 5, 0, 4, 6]
    assert mass(weights, heaviest(weights, 2)) == 6 / 12.5


def test_entropy():
    assert normalised_entropy(np.ones(32)) == pytest.approx(1, abs=1e-12)
    assert normalised_entropy(np.array([4.0, 0, 0, 0])) == 0
    assert normalised_entropy(np.array([2.0, 2, 0, 0])) == pytest.approx(0.5)  # log 2 / log 4
    assert normalised_entropy(np.ones(1)) is None


# ---- two runs --------------------------------------------------------------------------------------------


def test_overlap():
    one = np.arange(20.0)
    other = one.copy()
    other[[19, 0]] = 0, 19  # one of the two heaviest changes places with the lightest
    found = overlap(one, other)
    assert (found.top, found.common, found.by_chance) == (2, 1, 0.1)
    assert found.correlation == pytest.approx(spearmanr(one, other).statistic)
    assert found.correlation == pytest.approx(1 - 6 * 2 * 19**2 / (20 * (20**2 - 1)))
    assert overlap(one, -one).correlation == pytest.approx(-1)
    assert overlap(one, -one).common == 0
    assert overlap(one, np.ones(20)) is None
    assert overlap(np.arange(64.0), np.arange(64.0)).by_chance == 6 / 64  # six of 64 are called 10 %


def test_the_same_weights_count_once(tmp_path):
    values = [0.1, 0.5, 0.2]
    found = distinct(
        [
            read_one(tmp_path / "a", tap=values),
            read_one(tmp_path / "b", seed=1, tap=values),
            read_one(tmp_path / "c", dataset="dogs", tap=values[::-1]),
            read_one(tmp_path / "d", source="b", tap=values),  # equal numbers, but of other channels
        ]
    )
    assert [len(attention.alike) for attention in found] == [1, 0, 0]
    # Neither data set and backbone nor the run's id tells the first and the last apart.
    folder = "cub-net-delta-s0-0123abc0"
    assert names_of(found) == [str(tmp_path / "a" / folder), "dogs/net", str(tmp_path / "d" / folder)]
    other_setting = read_one(tmp_path / "e", seed=3, tap=[1, 2, 4])
    assert names_of([found[0], other_setting]) == ["cub/net 0123abc0", "cub/net 0123abc3"]
    remark = weight_table(found[:2]).remarks[0]
    assert "identical weights, counted once, in cub-net-delta-s0-0123abc0, cub-net-delta-s1-0123abc1" in remark


def test_only_the_same_channels_are_compared(tmp_path, capsys):
    values = np.random.default_rng(0).normal(size=(2, 40))
    one = read_one(tmp_path / "a", tap=values[0])
    other = read_one(tmp_path / "b", dataset="dogs", tap=values[1])
    (row,) = overlap_table([one, other]).rows
    assert [entry.text for entry in row[:2]] == ["cub/net and dogs/net", "tap"]
    assert row[4].value == pytest.approx(spearmanr(*values).statistic) and row[5].text == "40"
    assert capsys.readouterr().out == ""

    strangers = [
        read_one(tmp_path / "c", dataset="dogs", other=values[1]),
        read_one(tmp_path / "d", dataset="dogs", backbone="net2", tap=values[1]),
        read_one(tmp_path / "e", dataset="dogs", source="b", tap=values[1]),
    ]
    show_messages()
    for stranger in strangers:
        assert overlap_table([one, stranger]) is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(
        stranger.record["run_id"] in line for stranger, line in zip(strangers, lines, strict=True)
    )


# ---- the command -----------------------------------------------------------------------------------------

TABLE = """\
**Channel weights C*w of DELTA**

| attention of | layer | channels | smallest | median | largest |    sd \
| importance < 0 | entropy | mass of top 10 % | split-half | images |
| ------------ | ----- | -------: | -------: | -----: | ------: | ----: \
| -------------: | ------: | ---------------: | ---------: | -----: |
| cub/net      | one   |        3 |    0.767 |  0.980 |   1.252 | 0.199 \
|           33 % |  0.9821 |           41.7 % |       0.31 |     64 |
| cub/net      | two   |        4 |    1.000 |  1.000 |   1.000 | 0.000 \
|            0 % |  1.0000 |           25.0 % |          – |     64 |

- cub/net: cub-net-delta-s0-0123abc0
"""


def test_report(tmp_path, capsys):
    run = write_run(tmp_path / "a", fit={"one/split_half": 0.312}, one=[-1, 0, 1], two=[2, 2, 2, 2])
    out = tmp_path / "out"
    assert main([str(run), "--output", str(out)]) == 0
    assert (out / "attention.md").read_text(encoding="utf-8").startswith(TABLE)
    assert "1.252" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in out.glob("[!.]*")}
    assert set(first) == {"attention.md", "histograms.png", "histograms.pdf"}
    assert main([str(run), "--output", str(out)]) == 0
    assert first == {path.name: path.read_bytes() for path in out.glob("[!.]*")}  # no time of day in them


def test_weights_of_zero_are_in_the_histogram(tmp_path):
    """At a low temperature one channel has all the weight."""
    found = read_one(tmp_path, changes={"temperature": 0.01}, tap=[0, 0, 0, 5])
    assert found.weights["tap"].min() < 1e-9
    (axis,) = histograms([found]).axes
    assert sorted(bar.get_height() for bar in axis.patches if bar.get_height()) == [1, 3]
    assert "0.001" in axis.figure.get_supxlabel()


def test_what_is_missing_is_named_and_the_rest_reported(tmp_path, capsys):
    good = write_run(tmp_path / "good", tap=[0, 1, 2])
    damaged = write_run(tmp_path / "damaged", dataset="dogs", tap=[0, 1, 2])
    truncate(damaged)
    other = write_run(tmp_path / "other", dataset="mit67", tap=[0, 1, 2])
    (other / "attention.safetensors").unlink()
    unreadable = write_run(tmp_path / "unreadable", tap=[0, 1])
    (unreadable / "summary.json").write_text("{")
    nowhere = tmp_path / "nowhere"
    runs = [str(run) for run in (damaged, other, unreadable, nowhere, good)]
    assert main([*runs, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    for run in (damaged, other, unreadable, nowhere):
        assert run.name in printed.err
    assert "cub/net" in printed.out and "dogs" not in printed.out

    assert main([*runs[:-1], "--output", str(tmp_path / "empty")]) == 1
    assert not (tmp_path / "empty").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    run = write_run(tmp_path, tap=[0, 1, 2])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "file")):
        main([str(run), "--output", str(tmp_path / "file")])


# ---- patches ---------------------------------------------------------------------------------------------


def test_strongest_places_over_batches():
    maps = torch.zeros(5, 3, 2, 4)
    maps[0, 2, 1, 3] = 1
    maps[1, 2, 0, 1] = maps[1, 2, 1, 1] = 7  # twice in one image: it counts once, the upper one
    maps[2, 2, 0, 2] = 3
    maps[4, 2, 1, 0] = 3  # as large as an earlier one
    maps[:, 1] = -1 - torch.arange(5.0)[:, None, None]
    indices = np.array([10, 20, 30, 40, 50])
    batches = [torch.arange(2), torch.arange(2, 5)]
    found = strongest(lambda batch: {"tap": maps[batch]}, batches, indices, {"tap": np.array([2, 1])}, keep=3)
    assert found["tap"][0] == [Place(7, 20, 0, 1), Place(3, 30, 0, 2), Place(3, 50, 1, 0)]
    assert found["tap"][1] == [Place(-1, 10, 0, 0), Place(-2, 20, 0, 0), Place(-3, 30, 0, 0)]


def test_receptive_fields():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 8, (3, 5), padding=(1, 2)), nn.Flatten()
    )
    model.append(nn.Linear(8 * 100, 2))
    fields = ReceptiveFields(frozen_maps(Network(model, "5", ("0", "3")).freeze()), 20)
    assert fields.side("0") == 20 and fields.side("3") == 10
    assert fields.box("0", 7, 4) == (6, 9, 3, 6)
    assert fields.box("0", 0, 19) == (0, 2, 18, 20)  # cut off by the image's edge
    # Rows 4..6 of the pooled map: pixels 8..13, and one more at each side; columns 3..7: 6..15.
    assert fields.box("3", 5, 5) == (7, 15, 5, 17)
    assert fields.box("3", 0, 9) == (0, 5, 13, 20)


def test_what_lies_outside_a_receptive_field_does_not_matter():
    torch.manual_seed(0)
    model = SmallResNet(2)
    randomise_batchnorm(model)
    taps = ("layer1.1.conv2", "layer2.0.conv2")
    maps = frozen_maps(Network(model, "fc", taps).freeze())
    fields = ReceptiveFields(maps, 64)
    image = torch.randn(1, 3, 64, 64)
    # 3 pixels behind conv1, then four steps of 2 * 2; from there one step of 2 * 2 and one of 2 * 4.
    for tap, size in zip(taps, (19, 31), strict=True):
        middle = fields.side(tap) // 2
        top, bottom, left, right = fields.box(tap, middle, middle + 1)
        assert bottom - top == right - left == size
        inside = torch.zeros(64, 64, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        before = maps(image)[tap][0, :, middle, middle + 1]
        outside_changed = torch.where(inside, image, torch.randn_like(image))
        torch.testing.assert_close(maps(outside_changed)[tap][0, :, middle, middle + 1], before)
        inside[top], inside[:, left] = False, False  # the first row and column do matter
        assert not torch.allclose(maps(torch.where(inside, image, -image))[tap][0, :, middle, middle + 1], before)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """A run of DELTA on the embedded data."""
    results = tmp_path_factory.mktemp("results")
    overrides = [
        *("dataset=glyphs", "dataset.train_per_class=2", "dataset.test_per_class=2", "backbone.weights=none"),
        *("device=cpu", "schedule.iterations=1", "schedule.batch_size=8", "schedule.eval_every=0", "reg=delta"),
        *("reg.attention.images=8", "reg.attention.head_epochs=1", f"results_dir={results}"),
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert delta_run(monkeypatch, *overrides) == 0
    (folder,) = (results / "runs").iterdir()
    return folder


def test_patches_are_the_largest_of_all_test_images(tiny_run):
    run = replay(tiny_run)
    weights = attention_of(run.record).weights
    channels = {tap: heaviest(w, 4) for tap, w in weights.items()}
    indices = run.splits.test
    found = strongest(frozen_maps(run.source), run.images(indices), indices, channels, keep=3)

    model = run.source.copy()._model[0].eval()
    assert list(weights) == list(run.config.backbone.taps) != []
    for tap in weights:
        seen = []
        handle = model.get_submodule(tap).register_forward_hook(lambda module, args, output, s=seen: s.append(output))
        with torch.no_grad():
            for images in run.images(indices):
                for image in images:
                    model(image[None])
        handle.remove()
        every = torch.cat(seen).numpy()  # (N, C, h, w)
        for channel, places in zip(channels[tap], found[tap], strict=True):
            largest = every[:, channel].max(axis=(1, 2))
            best = np.argsort(-largest, kind="stable")[:3]
            assert [place.image for place in places] == indices[best].tolist()
            for place, number in zip(places, best, strict=True):
                assert place.value == pytest.approx(largest[number], rel=1e-4)
                assert every[number, channel, place.row, place.column] == pytest.approx(largest[number], rel=1e-4)


def test_patch_figures_are_written(tiny_run, tmp_path):
    assert main([str(tiny_run), "--patches", "--top", "1", "--output", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    taps = ("layer1.1.conv2", "layer2.1.conv2", "layer3.1.conv2")
    pictures = {f"patches-glyphs-small_resnet-{tap}.{kind}" for tap in taps for kind in ("png", "pdf")}
    assert names == pictures | {"attention.md", "histograms.png", "histograms.pdf"}


def test_patches_show_what_the_network_saw(tiny_run):
    run = replay(tiny_run)
    (found,) = distinct([attention_of(run.record)])
    (tap, figure), *_ = patch_figures(found, "name", run, 2)
    assert figure.get_suptitle().startswith(f"name, {tap}: where in 66 test images the 2 heaviest channels are largest")
    assert "19 x 19 of 32 x 32 pixels" in figure.get_suptitle()

    channels = {tap: heaviest(found.weights[tap], 2)}
    places = strongest(frozen_maps(run.source), run.images(run.splits.test), run.splits.test, channels)[tap]
    assert [label.count(f"channel {c}\n") for label, c in zip(row_labels(figure), channels[tap], strict=True)] == [1, 1]
    fields = ReceptiveFields(frozen_maps(run.source), 32)
    for axis, place in zip(figure.axes, places[0] + places[1], strict=True):
        top, bottom, left, right = fields.box(tap, place.row, place.column)
        (batch,) = run.images(np.array([place.image]))
        seen = batch[0, :, top:bottom, left:right].permute(1, 2, 0) * 0.25 + 0.5
        np.testing.assert_allclose(axis.images[0].get_array(), seen, atol=1e-5)


def test_patches_at_the_edge_have_the_scale_of_the_others():
    torch.manual_seed(0)
    taps = ("layer1.1.conv2", "layer3.1.conv2")
    fields = ReceptiveFields(frozen_maps(Network(SmallResNet(2), "fc", taps).freeze()), 32)
    pictures = {0: np.zeros((32, 32, 3), np.uint8), 1: np.ones((32, 32, 3), np.uint8)}

    def drawn(tap: str, *places: Place) -> list:
        figure = patch_figure("title", ["row"], [list(places)], pictures, {0: "a", 1: "b"}, fields, tap)
        return [
            (tuple(axis.images[0].get_extent()), axis.get_xlim(), axis.get_ylim())
            for axis in figure.axes[: len(places)]
        ]

    # Position 8 of 16 is at pixel 16, with nine to each side; position 0 at pixel 0, 15 at 30.
    corner, middle, other_corner = drawn(taps[0], Place(3, 0, 0, 0), Place(2, 1, 8, 8), Place(1, 1, 15, 15))
    assert middle == ((7, 26, 26, 7), (7, 26), (26, 7))
    assert corner == ((0, 10, 10, 0), (-9, 10), (10, -9))
    assert other_corner == ((21, 32, 32, 21), (21, 40), (40, 21))

    # 103 pixels from the last stage: the middle of 64 sees all, the corner only 51 behind its own, which stay in place.
    fields = ReceptiveFields(frozen_maps(Network(SmallResNet(2), "fc", taps).freeze()), 64)
    pictures = {0: np.zeros((64, 64, 3), np.uint8)}
    assert drawn(taps[1], Place(1, 0, 0, 0)) == [((0, 52, 52, 0), (0, 64), (64, 0))]


def row_labels(figure) -> list[str]:
    return [label for axis in figure.axes if (label := axis.get_ylabel())]


def test_a_run_on_folds_shows_no_test_image(tiny_run, tmp_path):
    record = json.loads((tiny_run / "summary.json").read_text())
    record["config"]["split"] |= {"folds": 2, "fold": 0}
    shutil.copytree(tiny_run, tmp_path / tiny_run.name)
    rewrite(tmp_path / tiny_run.name, record)
    run = replay(tmp_path / tiny_run.name)
    (_, figure), *_ = patch_figures(attention_of(run.record), "name", run, 1)
    assert "in 33 validation images" in figure.get_suptitle()


def test_without_the_source_weights_there_are_no_patches_but_tables(tiny_run, tmp_path, capsys):
    missing = tmp_path / "missing.pth"
    assert main([str(tiny_run), "--patches", "--weights", str(missing), "--output", str(tmp_path)]) == 0
    assert "no patches of glyphs/small_resnet" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"attention.md", "histograms.png", "histograms.pdf"}

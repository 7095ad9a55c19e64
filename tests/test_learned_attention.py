"""Pictures of the attention that AFA learned: what is kept of it, what is read of that, and what is drawn."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from delta_transfer import report
from delta_transfer.cli.case_study import main
from delta_transfer.common.errors import UserError
from delta_transfer.inspect.learned_attention import MODULES, attended, figure_of
from delta_transfer.inspect.replay import replay
from delta_transfer.records.checked import save_with_checksum

from .miniature import delta_run
from .test_case_study import glyph_overrides, write_source


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of AFA's two stages."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as monkeypatch:
        overrides = [*glyph_overrides(results, write_source(results)), "schedule.iterations=3"]
        assert delta_run(monkeypatch, *overrides, "reg=afa", "reg.alpha=0.001", "reg.channel_alpha=0.001") == 0
    (folder,) = (results / "runs").iterdir()
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


def shown(run: Path):
    made = replay(run)
    return attended(made, next(made.images(made.splits.test[:2])))


def test_the_modules_of_both_stages_and_the_network_between_them_are_kept(finished):
    modules, between, end = (load_file(finished / f"{name}.safetensors") for name in ("method", "stage1", "model"))
    assert {name.split(".")[0] for name in modules} == {"stage1", "stage2"}
    assert between.keys() == end.keys()
    assert not torch.equal(between["conv1.weight"], end["conv1.weight"])


def test_a_planted_position_is_where_the_attention_is(run):
    modules = load_file(run / MODULES)
    for name, value in modules.items():
        value.zero_()
        if name.startswith("stage1") and name.endswith("layers.2.bias"):
            value[-1] = 50  # the lower right corner
        if name.startswith("stage2") and name.endswith(".bias"):
            value[3] = 50
    (run / MODULES).write_bytes(save_with_checksum(modules))
    spatial, channel = shown(run)
    assert (spatial.over, channel.over) == ("positions", "channels")
    assert spatial.reads == "the source network" and channel.reads == "the network at the end of stage 1"
    for images in spatial.maps:
        for panel in images:
            assert panel[-1, -1] == panel.max() > 1 and panel[0, 0] == pytest.approx(0, abs=1e-6)
    strongest = [text for texts in channel.texts for text in texts[::2]]  # and the second of each tap
    assert all(text.startswith("channel 3: ") for text in strongest)
    shapes = replay(run).source.map_shapes(2, 32, training=False)
    assert channel.texts[0][0] == f"channel 3: {next(iter(shapes.values()))[0]}"  # C a, all of it on this one


def test_uniform_attention_is_one_everywhere(run):
    (run / MODULES).write_bytes(
        save_with_checksum({name: 0 * value for name, value in load_file(run / MODULES).items()})
    )
    spatial, _ = shown(run)
    assert spatial.maps.min() == pytest.approx(1) and spatial.maps.max() == pytest.approx(1)
    assert spatial.texts[0][0] == "1 to 1"


def test_channels_of_a_later_stage_are_those_of_the_network_between(run):
    """The attention is a function of its maps: with another network there it is another one."""
    before = shown(run)[1].maps
    weights = load_file(run / "stage1.safetensors")
    weights["conv1.weight"] = -weights["conv1.weight"]
    (run / "stage1.safetensors").write_bytes(save_with_checksum(weights))
    assert not (before == shown(run)[1].maps).all()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (MODULES, b"{}", "method.safetensors cannot be read"),
        (MODULES, save_with_checksum({"stage1.x": torch.zeros(1)}), "method.safetensors is not of this run"),
        ("stage1.safetensors", save_with_checksum({"x": torch.zeros(1)}), "stage1.safetensors is not of this run"),
        ("stage1.safetensors", None, "stage1.safetensors cannot be read"),
    ],
)
def test_a_damaged_file_is_named(run, name, data, message):
    (run / name).unlink()
    if data is not None:
        (run / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        shown(run)


def test_a_figure_has_a_panel_for_each_tap(run):
    made = replay(run)
    images = next(made.images(made.splits.test[:2]))
    spatial, channel = attended(made, images)
    pixels = images.permute(0, 2, 3, 1).numpy().clip(0, 1)
    taps = len(made.config.backbone.taps)
    assert len(figure_of(pixels, ["a", "b"], spatial).axes) == 2 * (1 + taps) + 1  # and the scale
    assert len(figure_of(pixels, ["a", "b"], channel).axes) == 2 * (1 + 2 * taps)


def test_the_case_study_draws_the_attention_of_each_stage(finished, tmp_path):
    assert main([str(finished), "--output", str(tmp_path), "--count", "1", "--count-images", "8"]) == 0
    for stage in (1, 2):
        (picture,) = tmp_path.glob(f"attention-*-stage{stage}.png")
        assert picture.stat().st_size > 5000
        assert f"Stage {stage}." in picture.with_suffix(".txt").read_text()
    page = tmp_path / "report.html"
    arguments = [str(finished), "--format", "html", "--pictures", str(tmp_path), "--output", str(page)]
    assert report.main(arguments) == 0
    shown = re.findall(r'<img src="data:image/png;base64,[^"]{5000,}" alt="attention-.*?-stage(\d)">', page.read_text())
    assert shown == ["1", "2"]
    for stage in (1, 2):
        assert f"Stage {stage}. Over the image in grey" in page.read_text()

"""Pictures of single images: which are chosen, what the maps are, what is written."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from safetensors.torch import save_file
from scipy.special import softmax

from delta_transfer.cli.case_study import main
from delta_transfer.common.errors import UserError
from delta_transfer.inspect.case_study import disagreements, imagenet_names, places_of, tidy
from delta_transfer.models import Network
from delta_transfer.models.zoo import BackboneConfig, build_source
from delta_transfer.records.arrays import Predictions

from .miniature import delta_run

needs_grad_cam = pytest.mark.skipif("not __import__('importlib').util.find_spec('pytorch_grad_cam')")


def glyph_overrides(results: Path, weights: Path) -> list[str]:
    """Long enough for two methods to disagree about some images."""
    return [
        *(
            "dataset=glyphs",
            "dataset.train_per_class=2",
            "dataset.test_per_class=4",
            f"backbone.weights={weights}",
            "device=cpu",
        ),
        *("schedule.iterations=8", "schedule.batch_size=16", "schedule.lr=0.05", "schedule.eval_every=0"),
        f"results_dir={results}",
    ]


def write_source(folder: Path) -> Path:
    """A network that a run can start from."""
    config = BackboneConfig(name="small_resnet", weights="none", image_size=32, resize=36, head="fc", taps=[])
    save_file(build_source(config, seed=0).weights(), folder / "source.safetensors")
    return folder / "source.safetensors"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of runs on the embedded data by method."""
    results = tmp_path_factory.mktemp("results")
    weights = write_source(results)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for reg in ("l2", "l2_fe", "delta_noatt"):
            assert delta_run(monkeypatch, *glyph_overrides(results, weights), f"reg={reg}") == 0
    return {folder.name.split("-")[2]: folder for folder in (results / "runs").iterdir()}


# ---- which images ----------------------------------------------------------------------------------------


def made(true: list[int], probability: list[float]) -> Predictions:
    """Two classes; `probability` of the true one."""
    p = np.array(probability)
    logits = np.where(np.arange(2) == np.array(true)[:, None], np.log(p)[:, None], np.log(1 - p)[:, None])
    return Predictions(np.array(true), logits, 100 + np.arange(len(true)))


def test_images_are_chosen_by_the_margin():
    true = [0, 1, 0, 1, 0, 1, 0]
    a = made(true, [0.4, 0.9, 0.3, 0.1, 0.9, 0.8, 0.4])
    b = made(true, [0.6, 0.2, 0.9, 0.3, 0.8, 0.3, 0.6])
    # b alone is right: 0 and 6 by 0.2, 2 by 0.6; a alone: 1 by 0.7, 5 by 0.5. 3: both are wrong, 4: both are right.
    found = disagreements(a, b)
    assert found["b_right_a_wrong"].tolist() == [2, 0, 6]
    assert found["a_right_b_wrong"].tolist() == [1, 5]
    reverse = disagreements(b, a)
    assert reverse["a_right_b_wrong"].tolist() == [2, 0, 6] and reverse["b_right_a_wrong"].tolist() == [1, 5]
    assert all(len(places) == 0 for places in disagreements(a, a).values())


def test_chosen_images_are_indices_of_the_data_set():
    predictions = made([0, 1, 0], [0.5, 0.5, 0.5])
    assert places_of([102, 100], predictions.index).tolist() == [2, 0]
    with pytest.raises(UserError, match="5, 103 .* from 100 to 102"):
        places_of([5, 101, 103], predictions.index)


def test_names_of_classes():
    assert tidy("012.Yellow_headed_Blackbird") == "Yellow headed Blackbird"
    assert (tidy("apple_pie"), tidy("St. Bernard"), tidy(".")) == ("apple pie", "St. Bernard", ".")


def test_the_sources_classes_have_names_where_they_are_imagenets():
    def network(classes: int) -> Network:
        return Network(torchvision.models.resnet18(num_classes=classes), head="fc")

    assert imagenet_names("resnet18", network(1000))[0] == "tench"
    assert imagenet_names("resnet18", network(7)) is None
    assert imagenet_names("small_resnet", network(1000)) is None


# ---- the command -----------------------------------------------------------------------------------------


@needs_grad_cam
def test_what_is_written(runs, tmp_path, capsys):
    a, b = runs["l2"], runs["l2_fe"]
    few = ["--count", "1", "--count-images", "16"]
    assert main([str(a), str(b), *few, "--output", str(tmp_path / "first")]) == 0
    out = capsys.readouterr().out
    stems = ("b_right_a_wrong", "a_right_b_wrong", "unused_channels")
    files = {f"{stem}.{end}" for stem in stems for end in ("png", "pdf", "txt")} | {"unused_channels.md"}
    assert {path.name for path in (tmp_path / "first").glob("[!.]*")} == files
    assert all(str(tmp_path / "first" / stem) in out for stem in stems) and "all taps" in out

    arrays = [np.load(run / "predictions.npz") for run in (a, b)]
    right = [made["logits"].argmax(axis=1) == made["labels"] for made in arrays]
    alone_b, alone_a = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    text = (tmp_path / "first" / "b_right_a_wrong.txt").read_text()
    assert f"L2-FE, seed 0 takes for the right class and L2, seed 0 does not: {min(1, alone_b)} of {alone_b}." in text
    assert f"reverse is true of {alone_a}, of 132 test images" in text and "no evidence" in text
    assert (tmp_path / "first" / "unused_channels.md").read_text().count("L2-FE, seed 0") == 4

    # The frozen backbone's channels stay as they are.
    rows = [line.split("|") for line in (tmp_path / "first" / "unused_channels.md").read_text().splitlines()]
    frozen = [[cell.strip() for cell in row[-3:-1]] for row in rows if len(row) > 2 and "L2-FE" in row[1]]
    assert frozen == [["0", "0"]] * 4

    assert main([str(a), str(b), *few, "--output", str(tmp_path / "second")]) == 0
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@needs_grad_cam
def test_images_chosen_by_hand_and_more_than_two_runs(runs, tmp_path, capsys):
    images = np.load(runs["l2"] / "predictions.npz")["index"][[5, 1]]
    command = [*map(str, runs.values()), "--images", ",".join(map(str, images)), "--output", str(tmp_path)]
    assert main(command) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"chosen", "unused_channels"}
    assert "chosen by hand" in (tmp_path / "chosen.txt").read_text()
    assert capsys.readouterr().err == ""  # the rebuilt networks say what the runs recorded
    assert main([*command, "--images", "9999"]) == 1
    assert "9999" in capsys.readouterr().err


@needs_grad_cam
def test_the_figure_says_what_the_run_recorded(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("delta_transfer.cli.case_study.write", lambda figure, path, text: drawn.append(figure))
    run = runs["l2"]
    arrays = np.load(run / "predictions.npz")
    assert main([str(run), "--images", str(arrays["index"][3]), "--output", str(tmp_path)]) == 0
    words = [text.get_text() for text in drawn[0].texts]
    probability = softmax(arrays["logits"][3].astype(float))
    predicted = probability.argmax()
    verdict = "✓ right" if predicted == arrays["labels"][3] else "✗ wrong"
    (said,) = (text for text in words if text.startswith(verdict))
    assert said.endswith(f", {100 * probability[predicted]:.0f} %")
    assert any(text.endswith(f"(image {arrays['index'][3]})") for text in words)
    assert any(text.startswith("of its own classes:\nsource class ") for text in words)


def test_one_run_gives_channels_alone(runs, tmp_path):
    assert main([str(runs["l2"]), "--count-images", "8", "--output", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {"unused_channels"}
    assert "8 test images" in (tmp_path / "unused_channels.txt").read_text()


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, monkeypatch, capsys):
    weights = runs["l2"].parent.parent / "source.safetensors"
    changed = ["dataset.test_per_class=2", "schedule.iterations=1"]
    assert delta_run(monkeypatch, *glyph_overrides(tmp_path, weights), "reg=l2", *changed) == 0
    (other,) = (tmp_path / "runs").iterdir()
    monkeypatch.setattr("delta_transfer.cli.case_study.grad_cam_package", lambda: None)
    assert main([str(runs["l2"]), str(other), "--output", str(tmp_path / "out")]) == 1
    assert "dataset_fingerprint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_network_is_refused(runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(runs["l2"], tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").unlink()
    monkeypatch.setattr("delta_transfer.cli.case_study.grad_cam_package", lambda: None)
    assert main([str(tmp_path / "published"), str(runs["l2_fe"]), "--output", str(tmp_path / "out")]) == 1
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_grad_cam_the_command_says_what_to_install(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert main([str(runs["l2"]), str(runs["l2_fe"]), "--output", str(tmp_path / "out")]) == 1
    assert "pip install 'delta-transfer[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--count", "0"], ["--silent", "1.5"], ["--images", "one"], []])
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(options and ["run", *options])
    assert stop.value.code == 2
    assert "delta-report case-study: error" in capsys.readouterr().err

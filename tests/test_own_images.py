"""A folder of one's own images: what delta-run chooses by itself."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from delta_transfer.cli.data import main
from delta_transfer.data import load_dataset
from delta_transfer.data.readers.folder import FolderConfig
from delta_transfer.engine import optimizers
from delta_transfer.engine.optimizers import automatic_length

from .miniature import composed, delta_run
from .trees import write_folder, write_image


@pytest.mark.parametrize(
    ("images", "length"),
    [
        (2, (300, 2)),
        (40, (300, 16)),
        (127, (300, 32)),
        (128, (300, 64)),
        (244, (300, 64)),
        (1000, (469, 64)),
        (19_000, (8906, 64)),
        (1_000_000, (9000, 64)),
    ],
)
def test_length_and_batches_follow_from_the_number_of_images(images, length):
    assert automatic_length(images, 64) == length


def test_a_folder_brings_its_schedule_and_any_other_replaces_it():
    def length(*overrides: str):
        schedule = composed("dataset=folder", *overrides).schedule.fitted_to(40)
        return schedule.iterations, schedule.epochs, schedule.batch_size

    assert length() == (300, None, 16)
    assert length("schedule.batch_size=8") == (300, None, 8)
    assert length("schedule.iterations=7") == (7, None, 64)
    assert length("schedule.epochs=7") == (None, 7, 64)
    assert length("schedule=paper") == (9000, None, 64)
    assert length("+experiment=table_quick") == (200, None, 32)


@pytest.fixture
def photos(tmp_path) -> list[str]:
    """Overrides for 20 + 4 images, of which a run with the default schedule would take 300 batches."""
    root = write_folder(tmp_path / "photos", **{"train/ants": 9, "train/bees": 11, "test/ants": 2, "test/bees": 2})
    small = ("backbone=small_resnet", "backbone.weights=none", "backbone.image_size=16", "backbone.resize=20")
    places = (f"dataset.root={root}", f"results_dir={tmp_path / 'results'}", "device=cpu")
    return ["dataset=folder", *places, *small, "reg=l2"]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(optimizers, "automatic_length", lambda images, batch_size: (images // 10, images // 5))


def records(tmp_path) -> list[dict]:
    return [json.loads(path.read_text()) for path in (tmp_path / "results").glob("runs/*/summary.json")]


def test_a_run_is_named_by_what_was_chosen_for_it(tmp_path, photos, short, monkeypatch, capsys):
    assert delta_run(monkeypatch, *photos) == 0
    assert delta_run(monkeypatch, *photos, "schedule.iterations=2", "schedule.batch_size=4") == 0
    assert "skipped" in capsys.readouterr().out
    (made,) = records(tmp_path)
    assert made["iterations"] == made["config"]["schedule"]["iterations"] == 2
    assert made["config"]["schedule"]["batch_size"] == 4


def test_a_run_says_and_records_what_verify_says(tmp_path, photos, short, monkeypatch, capsys):
    train = tmp_path / "photos" / "train"
    for number, path in enumerate((tmp_path / "photos").rglob("bees/*.jpg"), 100):  # ants look like them otherwise
        write_image(path, number)
    for name in ("train/ants", "train/bees"):
        Image.new("RGB", (9, 9), "black").save(tmp_path / "photos" / name / "plain.png")
    Image.effect_noise((20, 20), 80).save(train / "ants" / "twice.png")
    shutil.copy(train / "ants" / "twice.png", train / "bees" / "twice.png")
    (train / "bees" / "cut.png").write_bytes((train / "bees" / "twice.png").read_bytes()[:200])
    (train / "bees" / "notes.txt").touch()
    assert main(["verify", "folder", photos[1]]) == 1
    verified = capsys.readouterr().out
    assert delta_run(monkeypatch, *photos) == 1
    assert "cut.png" in capsys.readouterr().err
    assert delta_run(monkeypatch, *photos, "dataset.unreadable=skip") == 0
    said = capsys.readouterr().out
    for words in ("cut.png", "notes.txt", "plain.png", "twice.png"):
        assert words in said and words in verified
    (made,) = records(tmp_path)
    assert made["left_out"]["count"] == 2
    assert [Path(name).name for name in made["left_out"]["files"]] == ["cut.png", "notes.txt"]
    assert made["run_id"].startswith("photos-") and made["identity"]["dataset"]["name"] == "folder"


def test_runs_on_folds_are_as_long_as_the_final_ones(tmp_path, photos, short, monkeypatch):
    assert delta_run(monkeypatch, "-m", *photos, "split.folds=2", "split.fold=0,1") == 0
    assert delta_run(monkeypatch, *photos) == 0
    schedules = [(run["n_train"], run["config"]["schedule"]) for run in records(tmp_path)]
    lengths = [(n_train, schedule["iterations"], schedule["batch_size"]) for n_train, schedule in schedules]
    assert sorted(lengths) == [(9, 2, 4), (11, 2, 4), (20, 2, 4)]


def test_a_dry_run_says_what_is_chosen(photos, monkeypatch, capsys):
    assert delta_run(monkeypatch, *photos, "dry_run=true") == 0
    chosen = "photos, 20 training images: 300 iterations of 8 images (schedule.iterations=auto)"
    assert chosen in capsys.readouterr().out


def test_a_run_begins_with_what_it_trains(photos, monkeypatch, capsys):
    assert delta_run(monkeypatch, *photos, "reg=l2", "schedule.iterations=2", "schedule.batch_size=4") == 0
    said = "20 training, 4 test images of 2 classes (ants, bees); 2 iterations of 4 images of 16 x 16 pixels"
    assert said in capsys.readouterr().out


def test_a_sweep_says_once_what_holds_for_all_its_runs(tmp_path, photos, short, monkeypatch, capsys):
    root = tmp_path / "photos"
    (root / "test").rename(root / "val")
    (root / "train/ants/cut_off.png").write_bytes(b"")
    shutil.copy(min((root / "train/ants").glob("[0-9]*")), root / "train/bees/copy.png")
    said_once = ("the test split is val/", "cut_off.png", "copy.png")
    assert delta_run(monkeypatch, "-m", *photos, "reg=l2,l2_fe", "dataset.unreadable=skip") == 0
    output = capsys.readouterr().out
    assert [output.count(words) for words in said_once] == [1, 1, 1]
    assert len(records(tmp_path)) == 2


def test_a_test_part_of_another_name_is_named(tmp_path, capsys):
    root = write_folder(tmp_path, **{"train/ants": 3, "train/bees": 3, "val/ants": 1, "val/bees": 1})
    load_dataset(FolderConfig(reader="folder", name="folder", root=str(root)))
    assert f"{root}: the test split is val/" in capsys.readouterr().out


def test_a_batch_that_became_too_small_to_be_divided_is_refused(photos, monkeypatch, capsys):
    assert delta_run(monkeypatch, *photos, "schedule.accumulate=16") == 1
    assert "schedule.batch_size=8 cannot be divided by schedule.accumulate=16" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["many", "1.5", "true", "[3]", "0", "-1"])
def test_what_is_no_length_is_refused(photos, length, monkeypatch, capsys):
    assert delta_run(monkeypatch, *photos, f"schedule.iterations={length}") == 1
    assert "schedule.iterations must be" in capsys.readouterr().err


def test_pictures_that_are_left_out_are_counted(tmp_path, capsys):
    root = write_folder(tmp_path / "photos", **{"ants": 5, "bees": 5})
    (root / "bees" / "deep").mkdir()
    for name in ("ants/1.HEIC", "bees/deep/2.jxl", "bees/notes.txt", "bees/.hidden.heic"):
        (root / name).touch()
    assert main(["verify", "folder", f"dataset.root={root}"]) == 0
    said = capsys.readouterr().out
    assert (
        "ants/1.HEIC" in said and "bees/notes.txt" in said and ".hidden.heic" in said and "no class folder" not in said
    )
    next((root / "ants").glob("*.[jp]*g")).rename(root / "loose.jfif")
    assert main(["verify", "folder", f"dataset.root={root}"]) == 0
    said = capsys.readouterr().out
    assert "images in no class folder are left out: 1" in said and "9 decode" in said


@pytest.mark.parametrize("command", [["dataset=folder", "backbone.weights=none"], ["+experiment=which_is_best"]])
def test_a_path_with_brackets_is_taken_as_the_shell_passes_it(command, monkeypatch, capsys):
    assert delta_run(monkeypatch, *command, "dataset.root=photos (1)") == 1
    assert "There is no folder photos (1)" in capsys.readouterr().err

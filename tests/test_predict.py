"""delta-predict: a run's network on images of one's own."""

import csv
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from delta_transfer.cli.compose import compose_dataset as composed
from delta_transfer.cli.predict import main
from delta_transfer.common.errors import UserError
from delta_transfer.data import load_dataset
from delta_transfer.inspect.finished import config_of, finished

from .miniature import delta_run, rewrite, tiny_overrides, write_cub
from .test_replay import copied

CLASSES = ["001.Bird_0", "002.Bird_1", "003.Bird_2"]


def made(top: Path, *overrides: str) -> Path:
    """The folder of a run on a miniature CUB."""
    root = write_cub(top / "CUB_200_2011")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert delta_run(monkeypatch, *tiny_overrides(root, top / "results"), "reg=l2", *overrides) == 0
    (folder,) = (top / "results" / "runs").iterdir()
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("run"))


def files_of_test(run: Path) -> list[str]:
    """The files of the run's test images, in the order of its predictions."""
    dataset = load_dataset(finished(run).config.dataset)
    return [str(dataset.files[index]) for index in np.load(run / "predictions.npz")["index"]]


def recorded(run: Path) -> np.ndarray:
    logits = torch.from_numpy(np.load(run / "predictions.npz")["logits"])
    return logits.double().softmax(dim=1).numpy()


def predicted(capsys: pytest.CaptureFixture, run: Path, *arguments: object, status: int = 0) -> dict:
    capsys.readouterr()
    assert main([str(run), *map(str, arguments), "--format", "json", "--device", "cpu"]) == status
    return json.loads(capsys.readouterr().out)


def by_class(found: dict) -> np.ndarray:
    """(N, K) in the order of the classes."""
    ranked = [sorted(image["classes"], key=lambda entry: entry["index"]) for image in found["images"]]
    return np.array([[entry["probability"] for entry in entries] for entries in ranked])


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("schedule.aspect=keep", "backbone.mean=[0.2,0.5,0.7]", "precision=bf16"),
        ("schedule.aspect=keep", "schedule.test_crops=10"),
    ],
)
def test_test_images_get_the_probabilities_that_the_run_recorded(overrides, tmp_path, capsys):
    run = made(tmp_path, *overrides)
    files = files_of_test(run)
    shutil.rmtree(tmp_path / "results" / "cache", ignore_errors=True)
    found = predicted(capsys, run, *files, "--batch-size", 4)
    assert [image["image"] for image in found["images"]] == files and not found["refused"]
    np.testing.assert_allclose(by_class(found), recorded(run), atol=2e-6)
    assert {entry["class"] for image in found["images"] for entry in image["classes"]} == set(CLASSES)


def test_neither_data_nor_source_weights_need_to_be_there(run, tmp_path, capsys):
    (file, *_) = files_of_test(run)
    image = shutil.copy(file, tmp_path / "photo.jpg")
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("summary.json", "model.safetensors", "classes.json"):
        shutil.copy(run / name, moved)
    record = json.loads((moved / "summary.json").read_text())
    record["config"]["dataset"]["root"] = "/nowhere"
    record["config"]["backbone"]["weights"] = "nowhere.safetensors"
    rewrite(moved, record)
    np.testing.assert_allclose(by_class(predicted(capsys, moved, image)), recorded(run)[:1], atol=2e-6)


def test_the_most_probable_class_comes_first_and_top_limits(run, capsys):
    files = files_of_test(run)
    ranked = [[entry["index"] for entry in image["classes"]] for image in predicted(capsys, run, *files)["images"]]
    assert ranked == np.argsort(-recorded(run), axis=1).tolist()
    top = predicted(capsys, run, *files, "--top", 1)["images"]
    assert [[entry["index"] for entry in image["classes"]] for image in top] == [ranks[:1] for ranks in ranked]
    assert all(len(image["classes"]) == 3 for image in predicted(capsys, run, *files, "--top", 9)["images"])


def test_what_is_no_image_is_named_and_the_others_are_predicted(run, tmp_path, capsys):
    files = files_of_test(run)
    (tmp_path / "text.jpg").write_text("not an image")
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(Path(files[0]).read_bytes()[:400])
    arguments = [files[0], tmp_path / "text.jpg", damaged, tmp_path / "absent.jpg", files[1]]
    assert main([str(run), *map(str, arguments), "--format", "json", "--device", "cpu", "--batch-size", "2"]) == 1
    output, errors = capsys.readouterr()
    found = json.loads(output)
    assert [image["image"] for image in found["images"]] == files[:2]
    np.testing.assert_allclose(by_class(found), recorded(run)[:2], atol=2e-6)
    refused = {str(path) for path in arguments[1:4]}
    assert {entry["image"] for entry in found["refused"]} == refused
    assert all(f"error: {path}: " in errors for path in refused)


def test_images_of_more_than_8_bits_need_a_scale(run, tmp_path, capsys):
    grey = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "eight.png")
    assert predicted(capsys, run, tmp_path / "deep.png", status=1)["images"] == []
    main([str(run), str(tmp_path / "deep.png")])
    assert "--scale" in capsys.readouterr().err
    deep, eight = predicted(capsys, run, tmp_path, "--scale", "full")["images"]
    assert deep["classes"] == eight["classes"]


def test_nothing_but_refused_images_is_no_crash(run, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("not an image")
    assert main([str(run), str(tmp_path)]) == 1
    assert capsys.readouterr().out == ""


def test_folders_are_searched_at_any_depth_for_image_files(run, tmp_path, capsys):
    pixels = Image.new("RGB", (30, 24), "red")
    for name in ("b.PNG", "deep/er/a.webp", ".hidden/c.png", "__MACOSX/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image, and no error")
    found = predicted(capsys, run, tmp_path, tmp_path / "b.PNG")
    assert [Path(image["image"]).name for image in found["images"]] == ["b.PNG", "a.webp"]
    assert {Path(one["file"]).name for one in found["left_out"]} == {".hidden", "notes.txt"}
    (tmp_path / "c.HEIC").touch()
    found = predicted(capsys, run, tmp_path, status=1)
    assert len(found["images"]) == 2
    assert [one["image"] for one in found["refused"]] == [str(tmp_path / "c.HEIC")]
    (tmp_path / "empty").mkdir()
    found = predicted(capsys, run, tmp_path / "empty", status=1)
    assert "without an image" in found["refused"][0]["reason"]


def test_table_and_csv_say_the_same(run, tmp_path, capsys):
    files = files_of_test(run)[:2]
    assert main([str(run), *files, "--format", "csv", "--top", "2", "--output", str(tmp_path / "new" / "a.csv")]) == 0
    assert capsys.readouterr().out == ""
    lines = list(csv.DictReader(io.StringIO((tmp_path / "new" / "a.csv").read_text())))
    assert [(line["image"], line["rank"]) for line in lines] == [(file, rank) for file in files for rank in "12"]
    assert main([str(run), *files, "--top", "2"]) == 0
    table = capsys.readouterr().out
    assert all(file in table for file in files)
    for line in lines:
        assert re.search(rf"{line['class']} +{100 * float(line['probability']):.1f} %", table)
        assert CLASSES[int(line["index"])] == line["class"]


@pytest.mark.parametrize("form", ["list", "stdin"])
def test_lists_name_files_and_folders(form, run, tmp_path, monkeypatch, capsys):
    files = files_of_test(run)
    shutil.copytree(Path(files[0]).parent, tmp_path / "some folder")
    lines = [files[1], str(tmp_path / "some folder"), "", "absent.jpg", files[1]]
    content = b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    (tmp_path / "list.txt").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = predicted(capsys, run, f"@{tmp_path / 'list.txt'}" if form == "list" else "-", files[0], status=1)
    below = sorted(str(path) for path in (tmp_path / "some folder").iterdir())
    assert [image["image"] for image in found["images"]] == [files[1], *below, files[0]]
    assert [one["image"] for one in found["refused"]] == ["absent.jpg"]
    (tmp_path / "list.txt").write_text("\n\n")
    assert main([str(run), f"@{tmp_path / 'list.txt'}"]) == main([str(run), f"@{tmp_path / 'no.txt'}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [f"{name}.txt" in line for name, line in zip(("list", "no"), said, strict=True)] == [True, True]


def test_a_tree_of_classes_gets_an_accuracy(run, tmp_path, capsys):
    files, right = files_of_test(run), recorded(run).argmax(axis=1)
    truth = [CLASSES.index(Path(file).parent.name) for file in files]
    for file in files:
        (tmp_path / "tree" / "test" / Path(file).parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "tree" / "test" / Path(file).parent.name)
    (tmp_path / "tree" / "other").mkdir()
    shutil.copy(files[0], tmp_path / "tree" / "other")
    labelled = predicted(capsys, run, tmp_path / "tree")["labelled"]
    accuracy = json.loads((run / "summary.json").read_text())["test_top1"]
    assert (labelled["n"], labelled["accuracy"]) == (6, pytest.approx(accuracy))
    wrong = [(CLASSES[t], CLASSES[p]) for t, p in zip(truth, right, strict=True) if t != p]
    assert {(one["class"], one["predicted"]): one["n"] for one in labelled["confused"]} == Counter(wrong)
    assert "labelled" not in predicted(capsys, run, *files)  # the person named files


def test_csv_is_safe_in_a_spreadsheet_and_exact_for_programs(run, tmp_path, monkeypatch, capsys):
    hostile = copied(run, tmp_path / "hostile")
    classes = ["=cmd()", "-1", "\uff1da;b"]
    (hostile / "classes.json").write_text(json.dumps(classes))
    (tmp_path / "images").mkdir()
    names = ["-1+1.png", "=1.png", "a;=1.png", "\uff0b1.png"]
    for name in names:
        Image.new("RGB", (30, 24), "red").save(tmp_path / "images" / name)
    monkeypatch.chdir(tmp_path / "images")

    def read(*options: str) -> list[dict]:
        assert main([str(hostile), "--format", "csv", *options, "--", *names]) == 0
        return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))

    exact, safe = read("--exact"), read()
    assert list(dict.fromkeys(line["image"] for line in exact)) == names
    assert all(line["class"] == classes[int(line["index"])] for line in exact)
    written = list(dict.fromkeys(line["image"] for line in safe))
    assert written == [
        "./-1+1.png",
        "./=1.png",
        "a;=1.png",
        "./\uff0b1.png",
    ]
    assert {line["class"] for line in safe} == {"'=cmd()", "-1", "'\uff1da;b"}
    assert all(Path(line["image"]).is_file() for line in safe)
    assert main([str(hostile), "--format", "csv", "a;=1.png"]) == 0
    assert '"a;=1.png",1,' in capsys.readouterr().out


def test_a_class_name_cannot_become_a_formula_or_steer_a_terminal(run, tmp_path, capsys):
    hostile = copied(run, tmp_path / "hostile")
    (hostile / "classes.json").write_text(json.dumps(["=cmd()", "a\x1b[31m", "[bold]c"]))
    (file, *_) = files_of_test(run)
    for name in ("csv", "table", "json"):
        assert main([str(hostile), file, "--format", name]) == 0
        output = capsys.readouterr().out
        assert "\x1b" not in output and "[bold]c" in output and ("'=cmd()" in output) == (name == "csv")


def test_folders_whose_names_no_terminal_shows_are_classes_too(run, tmp_path, capsys):
    renamed = copied(run, tmp_path / "renamed")
    (renamed / "classes.json").write_text(json.dumps(["a\n\udce9", "b", "c"]))
    (tmp_path / "tree" / "a\n\udce9").mkdir(parents=True)
    shutil.copy(files_of_test(run)[0], tmp_path / "tree" / "a\n\udce9")
    assert predicted(capsys, renamed, tmp_path / "tree")["labelled"]["n"] == 1


def test_class_names_that_are_missing_or_damaged_are_named(run, tmp_path, capsys):
    damaged = copied(run, tmp_path / "damaged")
    (file, *_) = files_of_test(run)
    for content in ('["only one"]', "[", None):
        (damaged / "classes.json").unlink() if content is None else (damaged / "classes.json").write_text(content)
        assert main([str(damaged), file]) == 1
        assert "classes.json" in capsys.readouterr().err


def test_runs_that_cannot_predict_are_refused_in_one_sentence(run, tmp_path, capsys):
    (file, *_) = files_of_test(run)
    verification = asdict(composed("glyph_pairs", ["reg=l2"]))
    cases = {
        "task=classification": {"config": verification},
        "too hot": {"error": "too hot"},
        "schema": {"schema": 99},
        "model.safetensors": {"num_classes": 7},
    }
    for number, (message, changes) in enumerate(cases.items()):
        assert main([str(copied(run, tmp_path / str(number), **changes)), file]) == 1
        output, errors = capsys.readouterr()
        assert message in errors and errors.count("\n") == 1 and not output
    assert main([str(tmp_path / "nowhere"), file]) == 1
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "called", "arguments"),
    [
        ("cli.predict", "predict", ["RUN", "a.jpg"]),
        ("cli.export", "export", ["RUN", "--format", "onnx"]),
        ("cli.data", "verify", ["verify", "glyphs"]),
        ("report", "report", ["results"]),
    ],
)
def test_ctrl_c_leaves_one_sentence(command, called, arguments, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    module = importlib.import_module(f"delta_transfer.{command}")
    monkeypatch.setattr(module, called, interrupted)
    assert module.main(arguments) == 130
    assert capsys.readouterr().err == "error: stopped by SIGINT\n"


def test_an_output_that_is_a_folder_is_refused_before_anything_is_predicted(run, tmp_path, capsys):
    assert main([str(run), "absent.jpg", "--output", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert str(tmp_path) in errors and errors.count("\n") == 1


def test_no_image_and_no_file_of_a_run_is_replaced(run, tmp_path, capsys):
    (file, *_) = files_of_test(run)
    for output in (file, f"{Path(file).parent}/../{Path(file).parent.name}/{Path(file).name}", run / "summary.json"):
        before = Path(output).read_bytes()
        assert main([str(run), file, "--output", str(output)]) == 1
        assert Path(output).read_bytes() == before and Path(output).name in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "99999999999999999999"])
def test_numbers_out_of_range_are_refused(run, number, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(run), "a.jpg", "--batch-size", number])
    assert stop.value.code == 2 and number in capsys.readouterr().err.splitlines()[-1]


def test_a_terminal_that_lacks_a_letter_gets_its_number(run, tmp_path, monkeypatch):
    Image.new("RGB", (30, 24), "red").save(tmp_path / "\u65e5.png")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main([str(run), str(tmp_path), "--format", "csv"]) == 0
    out.flush()
    assert b'/\\u65e5.png",1,' in out.buffer.getvalue()


def test_help_is_a_manual_page_and_imports_no_torch():
    code = "import sys; from delta_transfer.cli import {0}; sys.argv[1:] = ['--help']\n"
    code += "try: {0}.main()\nfinally: assert 'torch' not in sys.modules"
    for command in ("predict", "export"):
        done = subprocess.run([sys.executable, "-c", code.format(command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"delta-{command} RUN" in done.stdout and "Exit status: 0" in done.stdout


def test_a_record_of_a_method_that_is_not_imported_says_what_to_import():
    record = {"run_id": "a-run", "config": asdict(composed("cub", ["reg=l2"]))}
    assert config_of(record).reg.name == "l2"
    record["config"]["reg"]["name"] = "mine"
    with pytest.raises(UserError, match=r"a-run: .* mine .*import my_run"):
        config_of(record)

"""The files of a finished run belong together, and whoever changed one is told which."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from delta_transfer import report
from delta_transfer.cli.export import main as export
from delta_transfer.cli.predict import main as predict
from delta_transfer.common.errors import UserError
from delta_transfer.inspect.finished import finished
from delta_transfer.records import arrays, reading
from delta_transfer.records.checked import load_with_checksum, save_with_checksum
from delta_transfer.records.files import LONGEST_HEADER, read_regular
from delta_transfer.records.integrity import with_digest
from delta_transfer.records.run_directory import RunDirectory

from .miniature import delta_run, rewrite, tiny_overrides, write_cub


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    top = tmp_path_factory.mktemp("made")
    return [*tiny_overrides(write_cub(top / "CUB_200_2011"), top / "results"), "reg=l2"]


@pytest.fixture(scope="module")
def made(command) -> Path:
    """The folder of a run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert delta_run(monkeypatch, *command) == 0
    (folder,) = Path(command[-3].partition("=")[2]).glob("runs/*")
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of the run in its own results folder."""
    return Path(shutil.copytree(made, tmp_path / "results" / "runs" / made.name))


def record_in(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def write_as_it_is(folder: Path, record: dict) -> None:
    (folder / "summary.json").write_text(json.dumps(record))


# ---- the record -----------------------------------------------------------------------------------------------------


def test_a_whole_run_is_trusted(run, capsys):
    assert not reading.read(run).get("unreadable") and RunDirectory(run).summary() is not None
    assert report.main([str(run)]) == 0
    assert run.name not in capsys.readouterr().err
    write_as_it_is(run, dict(reversed(record_in(run).items())))  # the order of keys says nothing
    assert not reading.read(run).get("unreadable")


@pytest.mark.parametrize(
    "change",
    [
        *({"test_top1": value} for value in (98.75, 250, -5, 1e308)),
        *({"seed": 7}, {"digests": {}}, {"digests": None, "test_top1": 250}, {"command": "another", "digests": []}),
    ],
)
def test_a_record_that_was_changed_is_named_everywhere(change, run, capsys):
    write_as_it_is(run, {key: value for key, value in (record_in(run) | change).items() if value is not None})
    assert reading.read(run)["unreadable"]
    assert report.main([str(run)]) == 1  # there is no other run
    said = capsys.readouterr()
    assert run.name in said.err and not said.out
    with pytest.raises(UserError, match=run.name):
        RunDirectory(run).summary()
    assert predict([str(run), "image.jpg"]) == export([str(run), "--format", "safetensors"]) == 1
    assert capsys.readouterr().err.count(f"{run / 'summary.json'}: ") == 2


def test_done_and_skipped_looks_at_record_and_predictions(made, command, tmp_path, monkeypatch, capsys):
    kept = shutil.copytree(made, tmp_path / "kept")
    try:
        for name, content in {
            "summary.json": json.dumps(record_in(made) | {"test_top1": 98.75}).encode(),
            "predictions.npz": changed_predictions(tmp_path, made),
        }.items():
            (made / name).write_bytes(content)
            assert delta_run(monkeypatch, *command) == 1
            assert str(made / name) in capsys.readouterr().err
            shutil.copy(kept / name, made / name)
        assert delta_run(monkeypatch, *command) == 0
    finally:
        shutil.copytree(kept, made, dirs_exist_ok=True)


def test_interpolations_in_a_record_are_text(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MY_SECRET", "hunter2")
    lure = "${oc.env:MY_SECRET}"
    record = record_in(run)
    record["config"]["backbone"]["weights"] = record["command"] = lure
    rewrite(run, record)
    assert export([str(run), "--format", "safetensors", "--output", str(tmp_path / "out")]) == 0
    made = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    for group, key in (("dataset", "name"), ("dataset", "reader"), ("reg", "name"), ("optimizer", "name")):
        wrong = json.loads(json.dumps(record))
        wrong["config"][group][key] = lure
        rewrite(run, wrong)
        assert predict([str(run), "image.jpg"]) == 1
    said = capsys.readouterr()
    assert lure.encode() in made and said.err.count(lure) == 4
    assert "hunter2" not in said.out + said.err and b"hunter2" not in made


# ---- what a record's files may be -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "predictions.npz", "classes.json"])
@pytest.mark.parametrize("kind", ["fifo", "zeros", "elsewhere"])
def test_only_regular_files_of_the_folder_are_read(kind, name, run, tmp_path):
    whole = reading.read(run)
    if kind == "elsewhere":
        shutil.move(run / name, tmp_path / name)
        (run / name).symlink_to(tmp_path / name)
    else:
        (run / name).unlink()
        os.mkfifo(run / name) if kind == "fifo" else (run / name).symlink_to("/dev/zero")
    if name == "summary.json":
        assert "unreadable" in reading.read(run)
        with pytest.raises(UserError, match="summary.json"):
            RunDirectory(run).summary()
    elif name == "classes.json":
        with pytest.raises(UserError, match=name):
            finished(run)
    else:
        with pytest.raises(reading.Damaged, match=name):
            (reading.metrics if name == "metrics.jsonl" else arrays.predictions)(whole)


def test_a_link_inside_the_folder_is_read_and_a_file_has_a_size(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b", 4) == b"1234"
    with pytest.raises(ValueError):
        read_regular(tmp_path / "a", 3)


def test_pictures_of_a_page_are_files_of_their_folder(tmp_path):
    from delta_transfer.reporting.page import PNG, picture_html

    (tmp_path / "pictures").mkdir()
    (tmp_path / "private.txt").write_text("hunter2")
    (tmp_path / "private.png").write_bytes(PNG)
    told: list[str] = []
    for name in ("a", "b", "c"):
        (tmp_path / "pictures" / f"{name}.png").write_bytes(PNG)
    (tmp_path / "pictures" / "a.txt").symlink_to(tmp_path / "private.txt")
    (tmp_path / "pictures" / "b.png").unlink()
    (tmp_path / "pictures" / "b.png").symlink_to(tmp_path / "private.png")
    os.mkfifo(tmp_path / "pictures" / "c.txt")
    pages = [picture_html(path, told.append) for path in sorted((tmp_path / "pictures").glob("*.png"))]
    assert pages == [None] * 3 and len(told) == 3


# ---- predictions ----------------------------------------------------------------------------------------------------


def changed_predictions(folder: Path, run: Path) -> bytes:
    """The predictions of a run, with one label changed."""
    found = dict(np.load(run / "predictions.npz"))
    found["labels"][0] = (found["labels"][0] + 1) % 3
    np.savez_compressed(folder / "changed.npz", **found)
    return (folder / "changed.npz").read_bytes()


def test_predictions_that_were_changed_are_named(run, tmp_path, capsys):
    (run / "predictions.npz").write_bytes(changed_predictions(tmp_path, run))
    with pytest.raises(reading.Damaged, match="predictions.npz"):
        arrays.predictions(reading.read(run))
    assert report.main([str(run), "--format", "csv"]) == 0  # the record is whole
    assert str(run / "predictions.npz") in capsys.readouterr().err


@pytest.mark.parametrize("digests", ["none", "new"])
def test_the_accuracy_is_that_of_the_predictions(digests, run, capsys):
    """Also where a record has no digests, or where somebody computed them anew."""
    record = record_in(run) | {"test_top1": 98.75}
    rewrite(run, record) if digests == "new" else write_as_it_is(run, without_digests(record))
    assert report.main([str(run)]) == 1
    assert f"skipped {run.name}: " in capsys.readouterr().err


def without_digests(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "digests"}


def test_a_bundle_keeps_digests_of_its_own(run, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    assert report.main(["publish", str(run), "--to", str(bundle)]) == 0
    (record,) = reading.read_bundle(bundle)
    assert not record.get("unreadable") and arrays.predictions(record) is not None
    name, found = record["run_id"], dict(np.load(bundle / "predictions.npz"))
    np.savez(bundle / "predictions.npz", **found | {f"{name}/logits": -found[f"{name}/logits"]})
    with pytest.raises(reading.Damaged, match="predictions"):
        arrays.predictions(record)
    line = json.loads((bundle / "records.jsonl").read_text())
    (bundle / "records.jsonl").write_text(json.dumps(line | {"test_top1": 98.75}) + "\n")
    assert reading.read_bundle(bundle)[0]["unreadable"]


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["without a checksum", "with one", "without digests"])
def test_weights_of_another_run_are_refused(kind, run, capsys):
    state = {name: value.clone() for name, value in load_file(run / "model.safetensors").items()}
    state["conv1.weight"][0, 0, 0, 0] += 1
    if kind == "with one":
        (run / "model.safetensors").write_bytes(save_with_checksum(state))
    else:
        save_file(state, run / "model.safetensors")
    if kind == "without digests":
        write_as_it_is(run, without_digests(record_in(run)))
    with pytest.raises(UserError, match="model.safetensors"):
        finished(run)
    assert predict([str(run), "image.jpg"]) == export([str(run), "--format", "safetensors"]) == 1
    assert capsys.readouterr().err.count(str(run / "model.safetensors")) == 2


def test_a_header_of_a_million_tensors_is_refused_at_once(tmp_path):
    header = ",".join(f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(100_000)).encode()
    header = b"{" + header + b"}"
    assert len(header) > LONGEST_HEADER
    (tmp_path / "evil.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=f"{LONGEST_HEADER:,}"):
        load_with_checksum(tmp_path / "evil.safetensors")
    many = {f"block.{n}.some.layer.weight": torch.zeros(1) for n in range(5_000)}  # far more than any network here has
    (tmp_path / "large.safetensors").write_bytes(save_with_checksum(many, {"model_card": "x" * 500_000}))
    assert len(load_with_checksum(tmp_path / "large.safetensors")[0]) == 5_000


def test_digests_do_not_depend_on_themselves():
    record = {"test_top1": 50.0, "digests": {"weights": "a"}}
    assert with_digest(with_digest(record)) == with_digest(record) != record

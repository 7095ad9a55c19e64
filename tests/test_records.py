"""Identity of a run, atomic writes, one process per directory."""

import dataclasses
import json
import os
import stat

import pytest
import torch

from delta_transfer.common.errors import UserError
from delta_transfer.engine import checkpoints
from delta_transfer.records.files import write_atomically
from delta_transfer.records.identity import run_id, run_identity
from delta_transfer.records.run_directory import RunDirectory

from .test_config import composed


def identity_of(*overrides: str, data: str = "d", weights: str = "w") -> str:
    config = composed(*overrides)
    return run_id(config, run_identity(config, data, weights))


@pytest.mark.parametrize(
    "override",
    [
        *(
            "device=cpu",
            "results_dir=elsewhere",
            "schedule.log_every=7",
            "schedule.eval_every=7",
            "model_card=true",
        ),
        "reg.attention.forward_images=7",
    ],
)
def test_places_and_logging_are_not_part_of_the_identity(override):
    assert identity_of(override) == identity_of()


def test_neither_is_the_folder_the_images_lie_in():
    assert identity_of("dataset=cub", "dataset.root=/there") == identity_of("dataset=cub")


def test_names_of_runs_stay():
    """Keys that came later are no part of a name where they say what a run without them did."""
    assert identity_of() == "glyphs-small_resnet-delta-s0-67b97bca"
    assert identity_of("reg=l2_sp") == "glyphs-small_resnet-l2_sp-s0-d37a8daf"
    assert identity_of("dataset=cub", "schedule=tll") == "cub-resnet101-delta-s0-0e14df4f"


@pytest.mark.parametrize(
    "override",
    [
        *("seed=1", "reg.alpha=0.5", "schedule.lr=0.5", "split.val_fraction=0.2"),
        *("schedule.decay=cosine", "schedule.decay_also_at=[0.9]", "schedule.pad=2", "schedule.accumulate=2"),
    ],
)
def test_settings_are(override):
    assert identity_of(override) != identity_of()


def test_so_are_the_data_and_the_weights():
    assert len({identity_of(), identity_of(data="other"), identity_of(weights="other")}) == 3


def test_the_configuration_itself_is_left_alone():
    config = composed()
    before = dataclasses.asdict(config)
    run_identity(config, "d", "w")
    assert dataclasses.asdict(config) == before


def test_only_one_process_works_in_a_run_directory(tmp_path):
    with (
        RunDirectory(tmp_path / "run"),
        pytest.raises(UserError, match="run is in work: process"),
        RunDirectory(tmp_path / "run"),
    ):
        pass
    with RunDirectory(tmp_path / "run"):  # free again
        pass


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_file_gets_its_name_when_it_is_on_disk_and_the_name_is_on_disk_afterwards(tmp_path, monkeypatch):
    """What a power failure leaves is the old file or the whole new one."""
    done = []

    def spy(name: str) -> None:
        whole = getattr(os, name)

        def call(*arguments):
            kind = name
            if name == "fsync":
                kind = "sync folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else "sync file"
            done.append(kind)
            return whole(*arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace"):
        spy(name)
    write_atomically(tmp_path / "file", b"new")
    assert done == ["sync file", "replace", "sync folder"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1'])
def test_a_summary_that_is_no_record_is_not_done(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    assert RunDirectory(tmp_path).summary() is None


def test_older_records_are_read_and_newer_ones_refused(tmp_path):
    for schema in ({}, {"schema": 1}, {"schema": 2}):
        (tmp_path / "summary.json").write_text(json.dumps(schema | {"test_top1": 50.0}))
        assert RunDirectory(tmp_path).summary()["test_top1"] == 50.0
    (tmp_path / "summary.json").write_text('{"schema": 3}')
    with pytest.raises(UserError, match=r"summary.json: unknown schema 3 \(this version reads up to 2\)"):
        RunDirectory(tmp_path).summary()


def test_a_checkpoint_of_another_version_is_named_and_not_used(tmp_path, monkeypatch, capsys):
    def write(version: int) -> None:
        monkeypatch.setattr(checkpoints, "FORMAT", version)
        with open(tmp_path / "last.pt", "wb") as file:
            checkpoints.write_checkpoint(file, {"progress": {"iterations_done": 3}}, torch.device("cpu"))

    current = checkpoints.FORMAT
    write(current)
    assert checkpoints.read_checkpoint(tmp_path / "last.pt", torch.device("cpu"))["progress"] == {"iterations_done": 3}
    write(current - 1)
    monkeypatch.setattr(checkpoints, "FORMAT", current)
    assert checkpoints.read_checkpoint(tmp_path / "last.pt", torch.device("cpu")) is None
    assert "it is of another version of delta-transfer" in capsys.readouterr().out
    assert not (tmp_path / "last.pt").exists()

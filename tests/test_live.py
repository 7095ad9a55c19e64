"""logging=tensorboard: the lines of metrics.jsonl under the same names."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from delta_transfer.common.options import OptionError
from delta_transfer.records.run_directory import RunDirectory, live_view

from .miniature import composed, delta_run, tiny_overrides, write_cub


def shown(folder) -> dict[str, dict[int, float]]:
    """name -> step -> value of all event files in `folder`."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_a_run_shows_what_it_records(tmp_path, monkeypatch):
    overrides = tiny_overrides(write_cub(tmp_path / "cub"), tmp_path / "results")
    assert delta_run(monkeypatch, *overrides, "reg=l2_sp", "logging=tensorboard") == 0
    (folder,) = (tmp_path / "results" / "runs").iterdir()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    expected = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                expected.setdefault(name, {})[line["step"]] = pytest.approx(value, rel=1e-6)
    assert {"cross_entropy", "loss", "lr", "test_top1"} <= expected.keys()
    assert shown(folder) == expected

    # It is the same run with and without.
    assert delta_run(monkeypatch, *overrides, "reg=l2_sp") == 0
    assert len(list((tmp_path / "results" / "runs").iterdir())) == 1


def test_a_resumed_run_shows_each_step_once(tmp_path):
    directory = RunDirectory(tmp_path)
    with live_view("tensorboard", directory, 0) as show:
        for step in (1, 2, 3):
            show({"step": step, "loss": float(step)})
    with live_view("tensorboard", directory, 1) as show:  # from a checkpoint after the first
        show({"step": 2, "loss": 20.0})
    assert shown(tmp_path) == {"loss": {1: 1.0, 2: 20.0}}


def test_a_process_that_does_not_write_shows_nothing(tmp_path):
    with live_view("tensorboard", RunDirectory(tmp_path, writes=False), 0) as show:
        show({"step": 1, "loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard_it_fails_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert delta_run(monkeypatch, "dataset=cub", f"dataset.root={tmp_path / 'absent'}", "logging=tensorboard") == 1
    assert "pip install 'delta-transfer[tensorboard]'" in capsys.readouterr().err


def test_there_is_no_other_view():
    with pytest.raises(OptionError) as error:
        composed("logging=wandb")
    assert error.value.key == "logging"

"""Reading what runs left: nothing filled in, everything damaged named."""

import io

import numpy as np
import pytest

from delta_transfer.records import reading as runs

GOOD = {"labels": np.array([0, 1]), "logits": np.eye(2, 3), "index": np.array([4, 7])}


def metrics_of(folder, text):
    (folder / "metrics.jsonl").write_text(text)
    return runs.metrics({"folder": folder})


def test_metrics(tmp_path):
    frame = metrics_of(tmp_path, '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0, "test_top1": 50.0}\n')
    assert frame["step"].tolist() == [1, 2] and frame["loss"].tolist() == [2.5, 2.0]
    assert np.isnan(frame["test_top1"][0]) and frame["test_top1"][1] == 50.0


def test_a_line_that_a_killed_run_did_not_end_is_not_looked_at(tmp_path):
    assert metrics_of(tmp_path, '{"step": 1, "loss": 2.5}\n{"step": 2, "lo')["step"].tolist() == [1]
    assert metrics_of(tmp_path, '{"step": 1') is None
    (tmp_path / "metrics.jsonl").unlink()
    assert runs.metrics({"folder": tmp_path}) is None


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "2"}', '{"step": 1e999}', '{"step": true}', ""])
def test_a_damaged_line_is_named(line, tmp_path):
    with pytest.raises(runs.Damaged, match=r"metrics.jsonl, line 2, is not a line of metrics"):
        metrics_of(tmp_path, f'{{"step": 1, "loss": 2.5}}\n{line}\n{{"step": 3, "loss": 1.0}}\n')


def test_predictions(tmp_path):
    assert runs.predictions({"folder": tmp_path}) is None
    np.savez_compressed(tmp_path / "predictions.npz", **GOOD)
    assert runs.predictions({"folder": tmp_path}).correct.tolist() == [True, True]


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.array([[0], [1]])},
        {"labels": np.array(0)},
        {"logits": np.zeros((2, 0))},
        {"logits": np.zeros(2)},
        {"logits": np.full((2, 3), np.nan)},
        {"index": np.array([4])},
    ],
)
def test_arrays_that_do_not_belong_together_are_named(change, tmp_path):
    np.savez_compressed(tmp_path / "predictions.npz", **GOOD | change)
    with pytest.raises(runs.Damaged, match="predictions.npz"):
        runs.predictions({"folder": tmp_path})


def test_damaged_bytes_are_named_wherever_they_are(tmp_path):
    whole = io.BytesIO()
    np.savez_compressed(
        whole, labels=np.arange(500) % 7, logits=np.random.default_rng(0).random((500, 7)), index=np.arange(500)
    )
    path, named = tmp_path / "predictions.npz", 0
    for position in range(0, len(whole.getvalue()), 997):
        damaged = bytearray(whole.getvalue())
        damaged[position : position + 2] = b"\xff\x00"
        path.write_bytes(damaged)
        try:
            runs.predictions({"folder": tmp_path})
        except runs.Damaged as error:
            named += str(path) in str(error)
    assert named > 10
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(runs.Damaged):
        runs.predictions({"folder": tmp_path})

"""Reading what runs left, in folders of their own or in a bundle: nothing filled in, everything damaged named."""

import io
import json

import numpy as np
import pytest
import torch

from delta_transfer.methods.attention import attention_weights
from delta_transfer.records import arrays
from delta_transfer.records import reading as runs
from delta_transfer.records.checked import save_with_checksum

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
    with pytest.raises(runs.Damaged, match="metrics.jsonl, line 2"):
        metrics_of(tmp_path, f'{{"step": 1, "loss": 2.5}}\n{line}\n{{"step": 3, "loss": 1.0}}\n')


def test_predictions(tmp_path):
    assert arrays.predictions({"folder": tmp_path}) is None
    np.savez_compressed(tmp_path / "predictions.npz", **GOOD)
    assert arrays.predictions({"folder": tmp_path}).correct.tolist() == [True, True]


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
        arrays.predictions({"folder": tmp_path})


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
            arrays.predictions({"folder": tmp_path})
        except runs.Damaged as error:
            named += str(path) in str(error)
    assert named > 10
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(runs.Damaged):
        arrays.predictions({"folder": tmp_path})


# ---- bundles ---------------------------------------------------------------------------------------------


def bundle(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_a_bundle_is_read_like_folders_of_runs(tmp_path):
    metrics = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "test_top1": 50.0}]
    folder = bundle(tmp_path / "b", json.dumps({"run_id": "a", "metrics": metrics}), json.dumps({"run_id": "c\x1b"}))
    np.savez(folder / "predictions.npz", **{f"a/{name}": values for name, values in GOOD.items()})
    (folder / "runs" / "going").mkdir(parents=True)
    (first, second), unfinished = runs.read_all([folder, folder])
    assert (first["run_id"], second["run_id"], unfinished) == ("a", r"c\x1b", ["going"])
    assert runs.metrics(first)["step"].tolist() == [1, 2] and runs.metrics(second) is None
    assert arrays.predictions(first).correct.tolist() == [True, True] and arrays.predictions(second) is None
    assert arrays.pair_similarities(first) is None and arrays.channel_weights(first) is None


def test_damaged_parts_of_a_bundle_are_named(tmp_path):
    lines = ["{", "[]", json.dumps({"run_id": "a", "metrics": [{"step": "1"}]}), json.dumps({"run_id": "b"})]
    folder = bundle(tmp_path / "b", *lines)
    np.savez(folder / "predictions.npz", **{"a/labels": GOOD["labels"]})
    records = runs.read_bundle(folder)
    assert [bool(record.get("unreadable")) for record in records] == [True, True, False, False]
    assert records[0]["run_id"].endswith("records.jsonl, line 1")
    with pytest.raises(runs.Damaged, match="metrics of a, line 1"):
        runs.metrics(records[2])
    with pytest.raises(runs.Damaged, match="predictions.npz"):
        arrays.predictions(records[2])
    (folder / "records.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(runs.Damaged, match="records.jsonl"):
        runs.read_all([folder])


# ---- channel weights -------------------------------------------------------------------------------------

DELTA = {"backbone": {"taps": ["b", "a"]}, "reg": {"name": "delta", "attention": {"temperature": 5.0}}}


@pytest.fixture
def fitted(tmp_path):
    """The record of a run and the importances in its attention.safetensors."""
    torch.manual_seed(0)
    importance = {"a": torch.randn(7), "b": torch.full((3,), 0.1), "a/split_half": torch.tensor(0.5)}
    (tmp_path / "attention.safetensors").write_bytes(save_with_checksum(importance, {"weights": "f" * 64}))
    return {"run_id": "x", "folder": tmp_path, "config": DELTA}, importance


def test_channel_weights_are_those_of_the_method(fitted):
    record, importance = fitted
    found = arrays.channel_attention(record)
    assert found.source == "f" * 64 and list(found.weights) == list(arrays.channel_weights(record)) == ["b", "a"]
    np.testing.assert_allclose(found.weights["a"], 7 * attention_weights(importance["a"], 5.0).numpy(), rtol=1e-5)
    assert found.weights["b"].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(found.importance["a"], importance["a"].double().numpy())
    (record["folder"] / "attention.safetensors").unlink()
    assert arrays.channel_attention(record) is None


def test_channel_weights_that_cannot_be_used_are_named(fitted):
    record, importance = fitted
    with pytest.raises(runs.Damaged, match="temperature"):
        arrays.channel_weights(record | {"config": DELTA | {"reg": {"name": "delta"}}})
    with pytest.raises(runs.Damaged, match="channels of c"):
        arrays.channel_weights(record | {"config": DELTA | {"backbone": {"taps": ["c"]}}})
    path = record["folder"] / "attention.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1] + b"\x40", whole[:40], b""):  # another value, an end that is missing, nothing
        path.write_bytes(damaged)
        with pytest.raises(runs.Damaged, match="attention.safetensors"):
            arrays.channel_weights(record)
    path.write_bytes(save_with_checksum(importance | {"a": torch.full((7,), torch.nan)}))
    with pytest.raises(runs.Damaged, match="channels of a"):
        arrays.channel_weights(record)

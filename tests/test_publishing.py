"""delta-report publish: what a bundle holds, and that a report of it is the report of its runs."""

import json

import numpy as np
import pytest
import torch

from delta_transfer import report
from delta_transfer.records import arrays
from delta_transfer.records import reading as runs
from delta_transfer.records.checked import save_with_checksum
from delta_transfer.reporting.publishing import publish, without_paths

from .test_report import record, save


def test_paths_are_cut_and_all_else_stays():
    record = {
        "command": "delta-run -m dataset.root=/data/CUB backbone.weights=/w/r18.pth results_dir=results/cub",
        "overrides": ["source=[{use:/s/model.safetensors,taps:[layer1]},resnet34:/w/r34.pth]"],
        "config": {"dataset": {"root": "/data/CUB"}, "backbone": {"taps": ["layer1.1.conv2"]}},
        "device": "cpu: Some/Model, 1 threads",
        "source": "birds.tgz (1.1 GB) from https://example.org/birds",
        "test_top1": 57.4,
    }
    assert without_paths(record) == {
        "command": "delta-run -m dataset.root=CUB backbone.weights=r18.pth results_dir=results/cub",
        "overrides": ["source=[{use:model.safetensors,taps:[layer1]},resnet34:r34.pth]"],
        "config": {"dataset": {"root": "CUB"}, "backbone": {"taps": ["layer1.1.conv2"]}},
        "device": "cpu: Some/Model, 1 threads",
        "source": "birds.tgz (1.1 GB) from https://example.org/birds",
        "test_top1": 57.4,
    }


@pytest.fixture
def results(tmp_path):
    """Two methods with two seeds, with metrics, predictions, class names and channel attention; one unfinished run."""
    records = [
        record(method, seed, 50.0 + 2 * seed, backbone__taps=["layer1"], reg__attention={"temperature": 5.0})
        for method in ("l2", "delta")
        for seed in (0, 1)
    ]
    save(tmp_path / "results", records)
    for number, one in enumerate(records):
        folder = tmp_path / "results" / "runs" / one["run_id"]
        (folder / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": NaN}\n{"step"')
        (folder / "classes.json").write_text('["wren", "robin"]')
        logits = np.random.default_rng(number).random((50, 2)).astype(np.float32)
        labels = np.where(np.arange(50) < one["test_top1"] / 2, logits.argmax(axis=1), logits.argmin(axis=1))
        np.savez(folder / "predictions.npz", labels=labels, logits=logits, index=np.arange(50))
        importance = {"layer1": torch.arange(4.0) ** (number + 1)}
        (folder / "attention.safetensors").write_bytes(save_with_checksum(importance))
    (tmp_path / "results" / "runs" / "going").mkdir()
    return tmp_path / "results"


def answers(capsys, folder, *options):
    code = report.main([str(folder), *options])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("options", [("--per-image",), ("--format", "json")])
def test_a_bundle_gives_the_tables_of_its_runs(options, results, tmp_path, capsys):
    assert report.main(["publish", str(results), "--to", str(tmp_path / "new" / "bundle")]) == 0
    assert sorted(path.name for path in (tmp_path / "new" / "bundle").iterdir()) == ["predictions.npz", "records.jsonl"]
    assert "going" in capsys.readouterr().err
    expected = answers(capsys, results, *options)
    assert expected[0] == 0 and answers(capsys, tmp_path / "new" / "bundle", *options) == expected


def test_every_part_of_a_run_is_in_the_bundle(results, tmp_path):
    publish([results], tmp_path / "bundle")
    ours, _ = runs.read_all([results])
    theirs = {one["run_id"]: one for one in runs.read_bundle(tmp_path / "bundle")}
    for one in ours:
        other = theirs[one["run_id"]]
        assert other["classes"] == ["wren", "robin"] and other["config"]["dataset"]["root"] == "data"
        assert runs.metrics(one).equals(runs.metrics(other))
        np.testing.assert_array_equal(arrays.predictions(one).logits, arrays.predictions(other).logits)
        np.testing.assert_array_equal(arrays.channel_weights(one)["layer1"], arrays.channel_weights(other)["layer1"])
    publish([tmp_path / "bundle"], tmp_path / "again")  # of a bundle: the same one
    for name in ("records.jsonl", "predictions.npz"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "bundle" / name).read_bytes()


def test_records_alone_and_what_is_left_out(results, tmp_path, capsys):
    one = sorted((results / "runs").glob("*-l2-s0-*"))[0]
    copy = tmp_path / "copy" / one.name
    copy.mkdir(parents=True)
    (copy / "summary.json").write_text((one / "summary.json").read_text())
    (tmp_path / "copy" / "cut").mkdir()
    (tmp_path / "copy" / "cut" / "summary.json").write_text("{")
    arguments = [str(results), str(tmp_path / "copy"), "--to", str(tmp_path / "bundle"), "--records-only"]
    assert report.main(["publish", *arguments]) == 0
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["records.jsonl"]
    said = capsys.readouterr().err
    assert f"left out, since a run of the same name comes before: {copy}\n" in said and "cut" in said
    lines = (tmp_path / "bundle" / "records.jsonl").read_text().splitlines()
    assert all(json.loads(line)["metrics"] == [] for line in lines)
    assert len(lines) == 4 and not any("folder" in json.loads(line) for line in lines)


def test_a_bundle_of_other_runs_is_not_replaced(results, tmp_path, capsys):
    one, two, *_ = sorted((results / "runs").glob("*-l2-*"))
    bundle = tmp_path / "bundle"
    publish = ["publish", "--to", str(bundle), "--records-only"]
    assert report.main([*publish, str(one)]) == 0
    before = (bundle / "records.jsonl").read_bytes()
    assert report.main([*publish, str(two)]) == 1
    assert one.name in capsys.readouterr().err and (bundle / "records.jsonl").read_bytes() == before
    assert report.main([*publish, str(bundle), str(one), str(two)]) == 0
    assert capsys.readouterr().err.count("comes before") == 1
    assert len((bundle / "records.jsonl").read_text().splitlines()) == 2


def test_nothing_to_publish(tmp_path, capsys):
    assert report.main(["publish", str(tmp_path), "--to", str(tmp_path / "bundle")]) == 1
    assert not (tmp_path / "bundle").exists()

"""delta-predict on molecules and delta-export of graph networks."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from delta_transfer.cli.export import main as export
from delta_transfer.cli.predict import main as predict
from delta_transfer.data.graphs import chains
from delta_transfer.experiment.experiment import run
from delta_transfer.inspect.finished import finished
from delta_transfer.models.zoo import NETWORKS, build_source

from .miniature import composed

SMILES = ["C" * n + end for n in range(1, 7) for end in ("O", "N", "c1ccccc1", "C1CC1")]
SHORT = ["backbone.weights=none", "device=cpu", "schedule.epochs=1", "schedule.batch_size=8", "reg=l2"]


def made(top: Path, dataset: str, file: str, header: str, lines: list[str]) -> Path:
    """The folder of a run on a small CSV file."""
    pytest.importorskip("rdkit")
    (top / file).write_text("\n".join([header, *lines]))
    options = [f"dataset={dataset}", f"dataset.root={top}", "dataset.cut=random", f"results_dir={top}", *SHORT]
    return top / "runs" / run(composed(*options)).summary["run_id"]


@pytest.fixture(scope="module")
def properties(tmp_path_factory) -> Path:
    lines = [f"{one},{n % 2},{(n // 2) % 2}" for n, one in enumerate(SMILES)]
    return made(tmp_path_factory.mktemp("properties"), "sider", "SIDER.csv", "smiles,=first,second", lines)


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> Path:
    header = "smiles,measured log solubility in mols per litre"
    lines = [f"{one},{one.count('C') - 20}" for one in SMILES]
    return made(tmp_path_factory.mktemp("values"), "esol", "delaney-processed.csv", header, lines)


def found(capsys, *words: object, status: int = 0) -> str:
    capsys.readouterr()
    assert predict([*map(str, words), "--device", "cpu"]) == status
    return capsys.readouterr().out


def csv_of(path: Path, smiles: list[str]) -> Path:
    path.write_text("\n".join(["id,smiles", *(f"{n},{one}" for n, one in enumerate(smiles))]))
    return path


def test_probabilities_are_those_of_the_runs_own_test(properties, tmp_path, capsys):
    with np.load(properties / "properties.npz") as arrays:
        names, logits = arrays["names"].tolist(), torch.from_numpy(arrays["logits"])
    expected = logits.double().sigmoid().numpy()
    file = csv_of(tmp_path / "own.csv", [*names[:1], "nonsense", *names[1:]])
    told = json.loads(found(capsys, properties, file, "--format", "json", status=1))
    assert [one["smiles"] for one in told["molecules"]] == names and told["unit"] == "probability"
    numbers = np.array([list(one["properties"].values()) for one in told["molecules"]])
    np.testing.assert_allclose(numbers, expected, atol=1e-5)
    assert [one["line"] for one in told["molecules"]][:2] == [2, 4] and "nonsense" in told["refused"][0]["molecule"]


def test_a_csv_file_is_safe_to_open_in_a_spreadsheet(properties, tmp_path, capsys):
    file = csv_of(tmp_path / "own.csv", ["CCO", "CCN"])
    rows = list(csv.reader(io.StringIO(found(capsys, properties, file, "--format", "csv"))))
    assert rows[0] == ["smiles", "'=first", "second"] and [row[0] for row in rows[1:]] == ["CCO", "CCN"]
    exact = list(csv.reader(io.StringIO(found(capsys, properties, file, "--format", "csv", "--exact"))))
    assert exact[0] == ["smiles", "=first", "second"] and exact[1:] == rows[1:]
    assert "CCO" in found(capsys, properties, file)


def test_values_are_in_the_unit_of_the_labels(values, tmp_path, capsys):
    with np.load(values / "values.npz") as arrays:
        names, expected = arrays["names"].tolist(), arrays["predicted"]
    told = json.loads(found(capsys, values, csv_of(tmp_path / "own.csv", names), "--format", "json"))
    assert told["unit"] == "value"
    numbers = np.array([list(one["properties"].values()) for one in told["molecules"]])
    np.testing.assert_allclose(numbers, expected, atol=1e-4)


def test_what_is_not_for_molecules_is_refused(properties, tmp_path, capsys):
    file = csv_of(tmp_path / "own.csv", ["CCO"])
    for words in ([file, "--top", "2"], [file, "--scale", "full"], [tmp_path / "none.csv"]):
        assert found(capsys, properties, *words, status=1) == ""
    file.write_text("molecule\nCCO\n")
    assert found(capsys, properties, file, status=1) == ""


def test_an_exported_file_computes_the_same_and_starts_a_run(values, tmp_path):
    assert export([str(values), "--format", "safetensors", "--output", str(tmp_path / "net.safetensors")]) == 0
    network, graphs = NETWORKS["gcn"](1), chains(2, 5)
    network.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    torch.testing.assert_close(network.eval()(graphs), finished(values).network(graphs)["logits"])
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        card = json.loads(file.metadata()["model_card"])
    record = json.loads((values / "summary.json").read_text())
    assert card["label_scale"] == record["label_scale"] and card["measured"]["test_rmse"] == record["test_rmse"]
    words = (tmp_path / "MODEL_CARD.md").read_text()
    assert "pixel" not in words and "RMSE" in words
    config = composed("dataset=esol", f"backbone.weights={tmp_path / 'net.safetensors'}").backbone
    assert torch.equal(build_source(config, 0).weights()["gnns.0.linear.weight"], network.gnns[0].linear.weight)


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_other_forms_are_refused(values, tmp_path, form):
    assert export([str(values), "--format", form, "--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())

"""The source network that comes with the package, and delta-pretrain, which made it."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from delta_transfer.cli import pretrain
from delta_transfer.data import load_dataset
from delta_transfer.models.zoo import build_source, weights_file
from delta_transfer.records.cards import read_card
from delta_transfer.records.checked import fingerprint

from .miniature import composed, delta_run

TINY = ["dataset.train_per_class=1", "dataset.test_per_class=1", "schedule.iterations=2", "schedule.batch_size=8"]
SHIPPED = weights_file("glyphs")


@pytest.fixture(scope="module")
def card():
    return read_card(SHIPPED)


def test_the_shipped_network_is_small_and_the_one_of_its_card(card):
    source = build_source(composed("dataset=glyphs").backbone, seed=0)
    weights = source.weights()
    assert fingerprint(weights) == card["weights_fingerprint"] and source.classes == card["num_classes"]
    stored = load_file(SHIPPED)
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    assert SHIPPED.stat().st_size < 2_000_000
    words = SHIPPED.with_suffix(".md").read_text()
    for said in (card["weights_fingerprint"], card["command"], f"{card['measured']['test_top1']:.2f} %"):
        assert said in words


def test_delta_pretrain_has_the_recipe_of_the_card(card):
    recipe = composed(name="pretrain")
    assert card["command"] == "delta-pretrain" and card["seed"] == recipe.seed and card["method"] == recipe.reg.name
    assert (card["started_from"], card["iterations"]) == (recipe.backbone.weights, recipe.schedule.iterations)
    assert card["num_classes"] * recipe.dataset.train_per_class == card["data"]["n_train"]
    network = {key: value for key, value in vars(recipe.backbone).items() if key != "weights"}
    assert card["network"] == network | {key: card["network"][key] for key in network.keys() & card["network"].keys()}


def test_it_knows_letters_that_it_was_not_trained_on_as_well_as_its_card_says(card):
    """One test image of each class: the share of right ones is within four standard errors."""
    config = composed(name="pretrain")
    dataset = load_dataset(config.dataset.replace(train_per_class=1, test_per_class=1))
    assert list(dataset.classes) == card["classes"]
    network = build_source(config.backbone.replace(weights="glyphs"), seed=0).eval()
    pixels = np.stack([np.asarray(dataset.load(i))[2:34, 2:34] for i in np.flatnonzero(dataset.is_test)])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        right = network(images)["logits"].argmax(dim=1).numpy() == dataset.labels[dataset.is_test]
    expected = card["measured"]["test_top1"] / 100
    assert abs(right.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(right))


def test_a_default_run_starts_from_it_and_its_identity_names_it(card, tmp_path, monkeypatch):
    overrides = [f"results_dir={tmp_path}", *TINY, "device=cpu"]
    assert delta_run(monkeypatch, *overrides, "reg=l2_fe") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["weights_fingerprint"] == summary["identity"]["backbone"]["weights"] == card["weights_fingerprint"]
    # L2-FE leaves the source's weights as they are, head apart.
    shipped, tuned = load_file(SHIPPED), load_file(folder / "model.safetensors")
    assert all((tuned[k] == v).all() for k, v in shipped.items() if not k.startswith("fc."))


def test_other_backbones_have_no_embedded_weights(tmp_path, monkeypatch, capsys):
    overrides = [f"results_dir={tmp_path}", "backbone=resnet18", "backbone.weights=glyphs"]
    assert delta_run(monkeypatch, *overrides) == 1
    assert "backbone.weights=glyphs does not fit resnet18" in capsys.readouterr().err


def test_delta_pretrain_is_an_ordinary_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["delta-pretrain", f"results_dir={tmp_path}", *TINY, "device=cpu"])
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    assert not stop.value.code
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["config"]["backbone"]["weights"] == "none"

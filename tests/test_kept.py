"""What is measured after a run: what the network kept of its source, and further test sets."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from delta_transfer.common.errors import UserError
from delta_transfer.common.options import OptionError
from delta_transfer.data import load_dataset
from delta_transfer.engine.config import EvaluateConfig, run_config_from
from delta_transfer.engine.kept import FurtherSets, source_head
from delta_transfer.experiment.experiment import run

from .miniature import composed, tiny_overrides, write_cub


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB")


@pytest.fixture(scope="module")
def words(root, tmp_path_factory) -> list[str]:
    return [*tiny_overrides(root, tmp_path_factory.mktemp("results")), "reg=l2_fe"]  # the backbone stays


def also(root: Path, folder: Path, classes: int) -> str:
    """A folder with the images of some classes."""
    for source in sorted((root / "images").iterdir())[:classes]:
        shutil.copytree(source, folder / source.name)
    return f"+evaluate.also.few={folder}"


def test_a_run_measures_what_it_is_asked_for_and_keeps_its_name(root, words, tmp_path):
    asked = [also(root, tmp_path / "few", 2), "evaluate.forgetting=true", f"evaluate.probe={root / 'images'}"]
    config = composed(*words, *asked)
    record = run(config).summary
    assert record["kept_agreement"] == 100.0  # the backbone is the source's
    assert record["kept_probe_top1"] == record["kept_probe_top1_before"]
    assert set(record["further_sets"]) == {"few", "images"} and 0 <= record["also_few_top1"] <= 100
    assert "evaluate" not in record["identity"]
    again = run_config_from(json.loads(json.dumps(asdict(config))))
    assert again.evaluate == config.evaluate
    assert run(composed(*words, *asked)).skipped


def test_a_finished_run_without_the_measurement_is_no_answer(root, words, tmp_path):
    plain = [*words, "seed=1"]
    run(composed(*plain))
    assert run(composed(*plain)).skipped
    with pytest.raises(UserError):
        run(composed(*plain, "evaluate.forgetting=true"))


def test_accuracy_on_a_further_set_is_that_of_its_classes_in_the_runs_order(root, words, tmp_path):
    """The run's own test images, as a folder."""
    folder = tmp_path / "test"
    dataset = load_dataset(composed(*words).dataset)
    for index in np.flatnonzero(dataset.is_test):
        file = dataset.files[index]
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.parent.name / file.name)
    elsewhere = [word for word in words if not word.startswith("results_dir=")] + [f"results_dir={tmp_path / 'r'}"]
    record = run(composed(*elsewhere, "seed=2", f"+evaluate.also.same={folder}")).summary
    assert record["also_same_top1"] == record["test_top1"]
    assert record["also_same_loss"] == pytest.approx(record["test_loss"], rel=1e-4)


def test_the_head_of_a_source_that_was_trained_on_the_probe_keeps_its_test_accuracy(root, words, tmp_path):
    """evaluate.probe=NAME with the source's classes: the first network's test accuracy, while its backbone stays."""
    (tmp_path / "CUB_200_2011").symlink_to(root)
    first = composed(*words[:-1], "reg=l2", "seed=3", "schedule.iterations=12")
    source = run(first).summary
    asked = [
        f"backbone.weights={Path(first.results_dir) / 'runs' / source['run_id'] / 'model.safetensors'}",
        *(f"data_dir={tmp_path}", "evaluate.forgetting=true", "evaluate.probe=cub", "evaluate.source_labels=true"),
    ]
    record = run(composed(*words, *asked, "seed=4")).summary
    assert record["kept_source_top1_before"] == record["kept_source_top1"] == source["test_top1"]
    assert source["test_top1"] > 0 and set(record["further_sets"]) == {"cub"}


def test_the_sources_head_is_applied_to_any_embedding(tiny_source):
    found = tiny_source(torch.randn(4, 3, 8, 8))
    assert torch.allclose(source_head(tiny_source, found["embedding"]), found["logits"], atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"probe": "x"}, {"forgetting": True, "source_labels": True}, {"also": {"a b": "x"}}],
)
def test_options_that_do_not_go_together_are_refused(options):
    with pytest.raises(OptionError):
        EvaluateConfig(**options)


def test_what_a_further_set_shares_or_lacks_is_named_before_the_run_begins(root, words, tmp_path, tiny_source, capsys):
    config = composed(*words, also(root, tmp_path / "few", 3))
    dataset = load_dataset(config.dataset)
    further = FurtherSets(config, dataset, tiny_source, {})
    trained = {dataset.names[index] for index in np.flatnonzero(~dataset.is_test)}
    said = capsys.readouterr().out
    assert f"few: images that are also in train: {sum(name in trained for name in further.also['few'].names)} " in said
    with pytest.raises(OptionError):
        FurtherSets(config, replace(dataset, classes=("another",)), tiny_source, {})

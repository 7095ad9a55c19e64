"""A miniature CUB-200-2011 in its publisher's layout, and the command line run in this process."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from delta_transfer.cli.compose import compose_config
from delta_transfer.common.console import log_once
from delta_transfer.engine.config import RunConfig
from delta_transfer.methods import METHODS
from delta_transfer.models.zoo import BackboneConfig, build_source
from delta_transfer.records.integrity import with_digest
from delta_transfer.train import main

CONF = Path(__file__).parent.parent / "conf"
GROUPS = ("dataset", "backbone", "reg", "schedule", "optimizer")


def names(group: str) -> list[str]:
    """The choices of a group of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def write_cub(root: Path, classes: int = 3, train: int = 6, test: int = 2, seed: int = 0) -> Path:
    """Images of `classes` colours with noise; the first image is grey, as two of the published ones are.

    train_test_split.txt has ids that images.txt lacks, as in folders that hold a subset of the classes.
    """
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    lists = {name: [] for name in ("images", "image_class_labels", "train_test_split", "classes")}
    number = 0
    for label in range(classes):
        name = f"{label + 1:03d}.Bird_{label}"
        lists["classes"].append(f"{label + 1} {name}")
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        for index in range(train + test):
            number += 1
            file = f"{name}/{name}_{index:04d}.jpg"
            lists["images"].append(f"{number} {file}")
            lists["image_class_labels"].append(f"{number} {label + 1}")
            lists["train_test_split"].append(f"{number} {int(index < train)}")
            pixels = rng.normal(90, 30, size=(24, 30, 3)) + 70 * np.eye(3)[label % 3]
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            (image.convert("L") if number == 1 else image).save(root / "images" / file)
    lists["train_test_split"] += [f"{number + 1} 1", f"{number + 2} 0"]
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def composed(*overrides: str, name: str = "config") -> RunConfig:
    """The configuration that `delta-run <overrides>` has."""
    return compose_config(name, overrides)


def delta_run(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """The exit status of `delta-run <overrides>`, which says what a process says once."""
    log_once.cache_clear()
    monkeypatch.setattr(sys, "argv", ["delta-run", *overrides])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def tiny_overrides(root: Path, results: Path) -> list[str]:
    """A run of three iterations on a miniature CUB with a small untrained network."""
    return [
        "dataset=cub",
        f"dataset.root={root}",
        "backbone=small_resnet",
        "backbone.weights=none",
        "backbone.image_size=16",
        "backbone.resize=20",
        "schedule.iterations=3",
        "schedule.batch_size=4",
        "schedule.log_every=1",
        f"results_dir={results}",
        "device=cpu",
    ]


def rewrite(folder: Path, record: dict) -> None:
    """Writes a run's summary.json with `record`, as if the run had ended with it."""
    (folder / "summary.json").write_text(json.dumps(with_digest(record)))


def source_for(reg: str, folder: Path) -> list[str]:
    """Words that name a source for methods which do not start from it, since their random target is not a source."""
    if reg in METHODS and not METHODS[reg].thing.needs.other_sources:  # sums with a name of their own have LwF
        return []
    path = folder / "source.safetensors"
    config = BackboneConfig(name="small_resnet", weights="none", image_size=16, resize=20, head="fc", taps=[])
    save_file(build_source(config, seed=3).weights(), path)
    return [f"source=small_resnet:{path}"]

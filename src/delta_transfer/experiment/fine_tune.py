"""fine_tune: one run on a folder of images, for programs. delta-run makes the same run from the same choices."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ..common.options import as_word, from_mapping, require
from ..engine.callbacks import AVERAGES
from ..engine.config import RunConfig, run_config_from
from ..engine.optimizers import OPTIMIZERS
from ..inspect.finished import finished
from ..models import Network
from ..models.named import NamedBackboneConfig
from .experiment import run

CONF = files("delta_transfer.conf")
REGISTERED = {"optimizer": [*OPTIMIZERS], "average": [*AVERAGES]}  # choices that need no file in conf/
GROUPS = ("dataset", "backbone", "reg", "schedule", "optimizer", "average")


@dataclass(frozen=True)
class FineTuned:
    """What `fine_tune` returns: the record and the network of a finished run."""

    record: dict[str, Any]  # summary.json: accuracies in percent, settings, versions; `folder` is the run's folder
    network: Network  # the fine-tuned one, frozen, on the CPU; network(images)["logits"] is (B, K)
    class_names: tuple[str, ...]  # in the order of the logits


def fine_tune(
    folder: str | Path,
    backbone: str = "resnet50",
    method: str = "l2",
    *,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> FineTuned:
    """Fine-tunes a network on a folder of images, `<class>/*` or `train/<class>/*` and `test/<class>/*`.

        tuned = fine_tune("photos", backbone="resnet50", method="delta", settings={"reg.alpha": 0.001})
        print(tuned.record["test_top1"])
        logits = tuned.network(images)["logits"]

    It is the run of `delta-run dataset=folder dataset.root=photos backbone=resnet50 reg=delta reg.alpha=0.001`. It has
    the same folder below `results/runs`, is skipped if it is finished there, and resumes if it was interrupted.

    Args:
        folder: the images, or a table of them (labels.csv).
        backbone: a name of conf/backbone; timm and torchvision take settings={"backbone.name": ...}.
        method: a name of conf/reg.
        settings: values of dotted keys of delta-run, such as schedule.iterations. A list is a Python list.
        more: values of keys without a dot, such as seed=1, results_dir="runs", device="cpu", and the choices
            schedule="quick", optimizer="adamw" and average="ema".

    Raises:
        UserError: for a key, a value or images that cannot be used, and for a run that fails (RunFailed).
        InUse: while another process makes the same run.
    """
    given = {"dataset.root": str(folder), **more, **(settings or {})}
    chosen = {"dataset": "folder", "backbone": backbone, "reg": method}
    chosen |= {group: given.pop(group) for group in GROUPS if group in given}
    config = configured(chosen, given)
    words = [f"{key}={as_word(value)}" for key, value in (chosen | given).items()]
    summary = run(config, words).summary
    made = finished(Path(config.results_dir) / "runs" / summary["run_id"])
    return FineTuned(made.record, made.network, made.class_names)


def configured(chosen: Mapping[str, str], settings: Mapping[str, Any]) -> RunConfig:
    """The configuration that delta-run composes of choices by group and values by dotted key. Raises UserError."""
    values, brought = composed(chosen)
    results_dir = settings.get("results_dir", "results")
    values |= {"cache_dir": f"{results_dir}/cache"}
    for key, value in settings.items():
        put(values, key, value)
    require(values.get("source") is None, "source= is for the command line: fine_tune learns from its own backbone.")
    require(not values.get("evaluate"), "evaluate= is for the command line: fine_tune has no further measurements.")
    by_epochs = values["schedule"].get("epochs") is not None and settings.get("schedule.iterations") is not None
    require(not by_epochs, "schedule.epochs replaces schedule.iterations: set one of them, and the other one to None.")
    if brought["backbone"] == "named":
        values["backbone"] = asdict(from_mapping(NamedBackboneConfig, values["backbone"]).complete())
    return run_config_from(values)


# --- The files of conf/, without Hydra ---


def composed(chosen: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The values and the schema of each group. A data set brings its schedule, and a schedule its optimizer."""
    names = {"schedule": "paper", "optimizer": "sgd", "average": "none"}
    values: dict[str, Any] = {}
    schemas: dict[str, str] = {}
    for group in GROUPS:
        name = str(chosen.get(group, names.get(group)))
        values[group] = {}
        for place, found in entries(group, name):
            if place == "values":
                merge(values[group], found)
            elif place == "schema":
                schemas[group] = found
            else:
                names[place] = found
    return values, schemas


def entries(group: str, name: str) -> Iterator[tuple[str, Any]]:
    """The contents of a file of conf/ and of the files of its defaults list, in their order.

    ("values", values), ("schema", the name of its options), or (a group, the choice that it brings).
    """
    folder, registered = CONF / group, REGISTERED.get(group, [])
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = {file.name.removesuffix(".yaml") for file in (folder.iterdir() if folder.is_dir() else ())}
        require(name in registered, f"{group}={name}: there is only {', '.join(sorted({*known, *registered}))}.")
        yield "values", {"name": name}
        return
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for entry in content.pop("defaults"):
        if entry == "_self_":
            yield "values", content
        elif isinstance(entry, str):
            yield from entries(group, entry)
        else:
            ((key, choice),) = entry.items()
            what, _, package = key.removeprefix("override ").partition("@")
            if what.startswith("/schema/"):
                yield "schema", choice
            elif key.startswith("override "):
                yield what.strip("/"), choice
            else:  # a term of a sum
                term: dict[str, Any] = {}
                for place, found in entries(what.strip("/"), choice):
                    if place == "values":
                        merge(term, found)
                inner: dict[str, Any] = {}
                put(inner, package, term)
                yield "values", inner


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value of a dotted key."""
    *groups, name = key.split(".")
    for group in groups:
        values = values.setdefault(group, {})
        require(isinstance(values, dict), f"{key}: {group} is a value and has no keys.")
    values[name] = value


def merge(values: dict[str, Any], others: Mapping[str, Any]) -> None:
    """Adds other values, which replace those of the same key."""
    for key, value in others.items():
        if isinstance(value, Mapping):
            merge(values.setdefault(key, {}), value)
        else:
            values[key] = value

"""Views of a record for tables: whether it is usable, the name of its row, the settings that distinguish it."""

import json
import re
from collections.abc import Collection, Iterable, Mapping

from ..common.pair_metrics import pair_metrics
from ..records.arrays import Predictions, pair_similarities
from ..records.integrity import WHAT_TO_DO
from ..records.reading import (
    Record,
    begins_at_random,
    config_of,
    folds,
    is_number,
    names_of_sources,
    one_line,
    recorded_sources,
    section,
    seed,
    stages,
)
from ..records.run_directory import SCHEMA

# Keys that change no result, or that a table shows in another way: a cell averages over seeds, names are the table's
# rows and columns, data and weights are compared by fingerprints. A key includes all keys below it.
NOT_SETTINGS = {
    *("device", "data_dir", "results_dir", "cache_dir", "logging", "dry_run", "retry_failed", "model_card", "seed"),
    "evaluate",
    *("dataset.root", "dataset.name", "dataset.download", "dataset.official", "dataset.train_root"),
    *("dataset.title", "dataset.source", "dataset.archives", "dataset.torchvision", "dataset.images"),
    *("dataset.train_list", "dataset.test_list", "dataset.line", "dataset.path", "dataset.joined"),
    *("dataset.classes", "dataset.class_line", "dataset.words", "dataset.labels", "dataset.ignore"),
    *("dataset.allow_empty", "dataset.nested", "dataset.unreadable", "dataset.max_pixels"),
    *("backbone.weights", "backbone.name", "reg.attention.forward_images"),
    *("schedule.log_every", "schedule.eval_every", "schedule.checkpoint_seconds"),
}


def validates(metric: str) -> bool:
    """Whether a metric is measured on validation data."""
    return metric.startswith("val_")


Settings = tuple[tuple[str, object], ...]  # ((key, value), ...)
Replicate = tuple[int, int | None]  # seed and fold; None without folds


def problem(record: object, metric: str = "test_top1") -> str | None:
    """Why this record cannot be part of any comparison, or None."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get("unreadable"):
        what = "record" if record.get("bundled") else "summary.json"
        return f"its {what} cannot be used: {one_line(record['unreadable'])}"
    if record.get("schema") != SCHEMA:
        return f"unknown schema {record.get('schema')!r} (this version reads {SCHEMA})"
    if record.get("error"):
        return f"failed: {one_line(record['error'])}"
    for group in ("dataset", "backbone", "reg"):
        if not isinstance(section(record, group).get("name"), str):
            return f"no config.{group}.name"
    if not isinstance(seed(record), int):
        return "no seed"
    value = record.get(metric)
    if value is None:
        return f"no {metric}"
    if not is_number(value):
        return f"{metric} is not a finite number: {value!r}"
    return None


def contradiction(record: Record, made: Predictions | None) -> str | None:
    """Why a record's accuracy is wrong: its predictions `made`, or its pairs, give another one. None if they agree.

    Raises Damaged for a file of pairs that cannot be read or was changed.
    """
    found: dict[tuple[str, str], float] = {}
    if made is not None:
        found["test_top1", "predictions.npz"] = 100 * float(made.correct.mean())
    if (pairs := pair_similarities(record)) is not None:
        found["test_pair_accuracy", "pairs.npz"] = pair_metrics(pairs.similarities, pairs.same, pairs.fold)[
            "pair_accuracy"
        ]
    for (key, file), value in found.items():
        recorded = record.get(key)
        if is_number(recorded) and abs(recorded - value) > 1e-6:
            return f"its {key} is {recorded}, but its {file} gives {value:.4f}, so one was changed: {WHAT_TO_DO}"
    return None


# ---- what distinguishes a record -------------------------------------------------------------------------


def replicate(record: Record, metric: str) -> Replicate:
    """The seed and the fold: a cell averages over both."""
    number = seed(record)
    assert isinstance(number, int)  # `problem` has checked it
    group, _, key = fold_key(record, metric).partition(".")
    fold = section(record, group).get(key)
    return number, fold if isinstance(fold, int) else None


def fold_key(record: Record, metric: str) -> str:
    """The key of the fold that was held out for validation, or that was tested in a data set of folds (dataset.fold).

    A run on folds of the training split is validated in one fold of such a data set.
    """
    return "split.fold" if validates(metric) and folds(record) else "dataset.fold"


def dataset_and_backbone(record: Record) -> tuple[str, str]:
    """The names of a row: cub, resnet18 | resnet34 -> resnet18 | resnet18 (random weights)."""
    backbone, names = section(record, "backbone")["name"], names_of_sources(record)
    if names:
        backbone = f"{' + '.join(names)} -> {backbone}"
    elif begins_at_random(record):
        backbone = f"{backbone} (random weights)"
    return section(record, "dataset")["name"], backbone


def settings(record: Record, metric: str) -> dict[str, object]:
    """The settings outside `reg` that must agree between runs of one row."""
    # Each fold is measured on its own inputs, and a cell is the mean of all folds.
    ignored = NOT_SETTINGS | {"reg", fold_key(record, metric)} | ({"split.fold"} if validates(metric) else set())
    flat = flatten(config_of(record))
    kept = {key: value for key, value in flat.items() if not within(key, ignored)}
    kept |= {key: value for key, value in versions(record).items() if not within(key, ["reg"])}
    # Each stage takes the whole schedule: runs are compared if all their stages together are equally long.
    for length in ("schedule.iterations", "schedule.epochs"):
        count = kept.get(length)
        if is_number(count):
            kept[length] = count * stages(record)
    # The same weights may have different paths, so the path counts only without a fingerprint.
    weights = record.get("weights_fingerprint") or flat.get("backbone.weights")
    fingerprint, selection = record.get("dataset_fingerprint"), record.get("selection")
    named = {"dataset_fingerprint": fingerprint, "weights": weights, "selection": selection}
    return kept | sources(record) | flatten(named)


def sources(record: Record) -> dict[str, object]:
    known = recorded_sources(record)
    names = " + ".join(f"{s.get('name')} {str(s.get('weights_fingerprint'))[:8]}" for s in known)
    return {"source": names or None, "source.taps": json.dumps([s.get("taps") for s in known]) if known else None}


def reg_settings(record: Record) -> dict[str, object]:
    """The settings inside `reg` that must agree between runs of one row."""
    ignored = NOT_SETTINGS | {"reg.name"}
    flat = flatten(section(record, "reg"), "reg.")
    flat |= {key: value for key, value in versions(record).items() if within(key, ["reg"])}
    # The terms of a sum have the same keys one level deeper.
    return {k: v for k, v in flat.items() if not within(k, ignored) and not k.endswith(".attention.forward_images")}


def versions(record: Record) -> dict[str, object]:
    """The versions of groups of options above 1: the same values mean something else in another version."""
    return {k: v for k, v in identity_of(record).items() if k.rpartition(".")[2] == "version" and v != 1}


def identity_of(record: Record) -> dict[str, object]:
    """The settings of a run that were not the defaults."""
    identity = record.get("identity")
    return flatten(identity) if isinstance(identity, dict) else {}


def strengths(reg: Mapping[str, object]) -> list[str]:
    """The keys of `reg_settings` that weigh a method's penalties, or those of the terms of a sum."""
    named = ("alpha", "channel_alpha", "temperature")
    own = [f"reg.{name}" for name in named]
    return own + [key for key in reg if re.fullmatch(rf"reg\.terms\.[^.]+\.({'|'.join(named)})", key)] + ["reg.beta"]


def facts(record: Record) -> dict[str, object]:
    """The facts about a run for the small print of a table."""
    schedule, size = section(record, "schedule"), section(record, "backbone").get("image_size")
    return {
        "iterations": record.get("iterations", schedule.get("iterations")),
        "batch_size": schedule.get("batch_size"),
        "lr": schedule.get("lr"),
        "image_size": None if size == 1 else size,  # 1: graphs have none
        "n_train": record.get("n_train"),
        "n_val": record.get("n_val") or None,
        "n_test": None if folds(record) else record.get("n_test"),  # runs on folds do not look at test images
        "precision": config_of(record).get("precision"),
    }


def common(views: list[dict[str, object]], keys: list[str]) -> Settings:
    """The scalars among `keys` that are present and the same in all of `views`."""
    first = views[0]
    return tuple(
        (key, first[key])
        for key in keys
        if isinstance(first.get(key), (int, float, str)) and all(view.get(key) == first[key] for view in views)
    )


def within(key: str, names: Collection[str]) -> bool:
    """True if `key` is one of `names` or nested below one."""
    while key and key not in names:
        key = key.rpartition(".")[0]
    return bool(key)


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested keys joined by dots; lists as JSON, which can be compared and shown."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


# ---- words -----------------------------------------------------------------------------------------------


def show(pairs: Settings) -> str:
    return ", ".join(f"{key}={_show_value(key, value)}" for key, value in pairs)


def _show_value(key: str, value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = one_line(value)
    is_hex = all(c in "0123456789abcdef" for c in text)
    # Eight characters of a fingerprint distinguish two; a path of weights is shown in full.
    return text[:8] if key == "dataset_fingerprint" or (key == "weights" and is_hex) else text


def distinct(values: Iterable[object]) -> list[str]:
    return sorted({one_line(value) for value in values if value not in (None, "")})

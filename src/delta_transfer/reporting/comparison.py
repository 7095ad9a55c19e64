"""Records of finished runs -> one comparison of methods. Pure functions, no I/O.

A cell is the mean over seeds of runs that differ in nothing else. Whatever does differ splits rows:
a setting outside `reg` splits all methods of a dataset and backbone, a setting inside `reg` only the
method which was run with several values of it. Methods may differ from each other in `reg`, of course.
"""

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from delta_transfer.records import NOT_IDENTITY

METHODS = {
    "l2": "L2",
    "l2_fe": "L2-FE",
    "l2_sp": "L2-SP",
    "delta_noatt": "DELTA w/o ATT",
    "delta": "DELTA",
}
METRICS = {"test_top1": "Test", "val_top1": "Validation"}
NEWEST_SCHEMA = 1

# Not what was computed. The seed is what a cell averages over; names are the table's own rows and columns; data and
# weights are compared by fingerprint (`settings`), not by place.
NOT_SETTINGS = NOT_IDENTITY | {"seed", "dataset.root", "dataset.name", "backbone.weights", "backbone.name"}

Settings = tuple[tuple[str, object], ...]  # ((key, value), ...)


@dataclass(frozen=True)
class Cell:
    by_seed: dict[int, float]
    val_loss: float | None = None  # mean over the seeds, if every run recorded it

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single run."""
        return statistics.stdev(self.by_seed.values()) if self.n > 1 else None


@dataclass(frozen=True)
class Row:
    dataset: str
    backbone: str
    shared: Settings  # outside reg: what sets this row apart from the others of its dataset and backbone
    reg: Settings  # inside reg: what sets this row apart for a method that was run with several settings
    cells: dict[str, Cell] = field(default_factory=dict)  # by method; a method without runs is absent

    @property
    def settings(self) -> str:
        return show(self.shared + self.reg)


@dataclass(frozen=True)
class Comparison:
    metric: str
    title: str
    methods: list[str]
    rows: list[Row]
    notes: list[str]  # what a reader needs to know under the table, one line each
    warnings: list[str]  # what the person who made the table needs to know


def problem(record: object, metric: str = "test_top1") -> str | None:
    """Why this record cannot be a part of any comparison, or None."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get("unreadable"):
        return f"summary.json is unreadable: {one_line(record['unreadable'])}"
    schema = record.get("schema", 1)
    if not isinstance(schema, int) or schema > NEWEST_SCHEMA:
        return f"unknown schema {schema!r} (this version reads up to {NEWEST_SCHEMA})"
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


def compare(records: Iterable[dict], metric: str = "test_top1") -> Comparison:
    """The table of `metric` over `records`, each of which has no `problem`."""
    records = sorted(records, key=run_id)
    rows: dict[tuple, Row] = {}
    warnings: list[str] = []

    for (dataset, backbone), runs in grouped(records, dataset_and_backbone):
        for shared, runs_alike in grouped_by_varying(runs, settings):
            for method, method_runs in grouped(runs_alike, method_of):
                for reg, same in grouped_by_varying(method_runs, reg_settings):
                    key = (dataset, backbone, shared, reg)
                    row = rows.setdefault(key, Row(*key))
                    row.cells[method] = cell_of(same, metric, warnings)

    ordered = sorted(rows.values(), key=row_order)
    methods = sorted({method for row in ordered for method in row.cells}, key=method_order)
    best = best_on_validation(ordered, methods) if metric == "val_top1" else []
    notes = best + describe(records, methods)
    return Comparison(metric, title_of(records, metric), methods, ordered, notes, warnings)


def cell_of(runs: list[dict], metric: str, warnings: list[str]) -> Cell:
    kept: dict[int, dict] = {}
    for run in runs:
        if seed(run) in kept:
            first = run_id(kept[seed(run)])
            warnings.append(f"duplicate {run_id(run)}: same settings and seed as {first}, which is kept")
        else:
            kept[seed(run)] = run
    losses = [run.get("val_loss") for run in kept.values()]
    val_loss = statistics.fmean(losses) if all(is_number(loss) for loss in losses) else None
    return Cell({s: float(run[metric]) for s, run in kept.items()}, val_loss)


def best_on_validation(rows: list[Row], methods: list[str]) -> list[str]:
    """One line for each method which was run with several reg settings. Never for test accuracies."""
    groups = grouped(rows, lambda row: (row.dataset, row.backbone, row.shared))
    lines = []
    for (dataset, backbone, shared), candidates in groups:
        place = ", ".join(filter(None, [dataset, backbone, show(shared)]))
        where = f" on {place}" if len(groups) > 1 else ""
        for method in methods:
            tried = [row for row in candidates if row.reg and method in row.cells]
            if len(tried) > 1:
                top = max(row.cells[method].mean for row in tried)
                tied = [row for row in tried if row.cells[method].mean == top]
                # Few validation images tie often; their loss then decides.
                if all(row.cells[method].val_loss is not None for row in tied):
                    tied = [min(tied, key=lambda row: row.cells[method].val_loss)]
                winners = " or ".join(show(row.reg) for row in tied)
                lines.append(f"best on validation: {display(method)} {winners} ({top:.1f}){where}")
    return lines


# ---- what is said around the table -----------------------------------------------------------------------


def title_of(records: list[dict], metric: str) -> str:
    rules = distinct(record.get("selection") for record in records)
    selection = f", {' / '.join(rules)}" if rules else ""
    return f"{METRICS[metric]} top-1 accuracy (%){selection}; mean ± sample std over seeds (n)"


def describe(records: list[dict], methods: list[str]) -> list[str]:
    """Hyper-parameters, settings common to all runs, hardware, versions, commits, times."""
    by_method = dict(grouped(records, method_of))
    notes = []
    for method in methods:
        # Only what all runs of the column share; the rest is in the settings of the rows.
        constant = common([reg_settings(run) for run in by_method[method]], ["reg.alpha", "reg.beta"])
        if constant:
            notes.append(f"{display(method)}: {show(constant).replace('reg.', '')}")

    constant = common([facts(record) for record in records], list(facts({})))
    if constant:
        notes.append(f"All runs: {show(constant)}")

    devices = distinct(record.get("device") for record in records)
    if devices:
        notes.append(f"Hardware: {'; '.join(devices)}")
    versions = [v for record in records if isinstance(v := record.get("versions"), dict)]
    packages = [
        f"{package} {' and '.join(found)}"
        for package in sorted({package for v in versions for package in v})
        if (found := distinct(v.get(package) for v in versions))
    ]
    if packages:
        notes.append(f"Versions: {', '.join(packages)}")
    commits = distinct(
        re.sub(r"^([0-9a-f]{7})[0-9a-f]*", r"\1", str(c)) for record in records if (c := record.get("git_commit"))
    )
    if commits:
        notes.append(f"Commits: {', '.join(commits)}")

    times = []
    for method in methods:
        seconds = [run["train_seconds"] for run in by_method[method] if is_number(run.get("train_seconds"))]
        if seconds:
            times.append(f"{display(method)} {duration(statistics.fmean(seconds))}")
    if times:
        notes.append(f"Mean training time per run: {', '.join(times)}")
    return notes


def facts(record: dict) -> dict[str, object]:
    schedule = section(record, "schedule")
    return {
        "iterations": record.get("iterations", schedule.get("iterations")),
        "batch_size": schedule.get("batch_size"),
        "lr": schedule.get("lr"),
        "image_size": section(record, "backbone").get("image_size"),
        "n_train": record.get("n_train"),
        "n_test": record.get("n_test"),
        "precision": config_of(record).get("precision"),
    }


def common(dicts: list[dict], keys: list[str]) -> Settings:
    """The scalars among `keys` which are present and the same in all of `dicts`."""
    first = dicts[0]
    return tuple(
        (key, first[key])
        for key in keys
        if isinstance(first.get(key), (int, float, str)) and all(d.get(key) == first[key] for d in dicts)
    )


# ---- what a record says; any part of it may be missing ---------------------------------------------------


def run_id(record: dict) -> str:
    return str(record.get("run_id"))


def config_of(record: dict) -> dict:
    config = record.get("config")
    return config if isinstance(config, dict) else {}


def section(record: dict, group: str) -> dict:
    value = config_of(record).get(group)
    return value if isinstance(value, dict) else {}


def seed(record: dict) -> object:
    return record.get("seed", config_of(record).get("seed"))


def method_of(record: dict) -> str:
    return section(record, "reg")["name"]


def dataset_and_backbone(record: dict) -> tuple[str, str]:
    return section(record, "dataset")["name"], section(record, "backbone")["name"]


def settings(record: dict) -> dict[str, object]:
    """All that must agree between runs of one row, outside `reg`."""
    flat = flatten(config_of(record))
    kept = {k: v for k, v in flat.items() if k not in NOT_SETTINGS and not k.startswith("reg.")}
    # The same weights may lie in different places, so a path is looked at only where there is no fingerprint.
    weights = record.get("weights_fingerprint") or flat.get("backbone.weights")
    fingerprint, selection = record.get("dataset_fingerprint"), record.get("selection")
    return kept | flatten({"dataset_fingerprint": fingerprint, "weights": weights, "selection": selection})


def reg_settings(record: dict) -> dict[str, object]:
    return {k: v for k, v in flatten(section(record, "reg"), "reg.").items() if k != "reg.name"}


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


# ---- grouping and order ----------------------------------------------------------------------------------


def grouped(items: Iterable, key: Callable) -> list[tuple]:
    """(key, items) pairs in the order of first appearance."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.items())


def grouped_by_varying(records: list[dict], view: Callable) -> list[tuple[Settings, list[dict]]]:
    """Groups of records which agree in all of `view`, named by only those keys which vary among `records`."""
    views = [view(record) for record in records]
    keys = sorted({key for v in views for key in v})
    varying = [key for key in keys if len({v.get(key, "?") for v in views}) > 1]
    groups = defaultdict(list)
    for record, v in zip(records, views, strict=True):
        groups[tuple((key, v.get(key, "?")) for key in varying)].append(record)
    return list(groups.items())


def row_order(row: Row) -> tuple:
    return row.dataset, row.backbone, settings_order(row.shared), settings_order(row.reg)


def settings_order(pairs: Settings) -> tuple:
    # Keys first: the rows of one sweep stay together, then its values in numeric order.
    return [key for key, _ in pairs], [value_order(value) for _, value in pairs]


def value_order(value: object) -> tuple:
    return (0, value, "") if is_number(value) else (1, 0, str(value))


def method_order(method: str) -> tuple:
    known = list(METHODS)
    return (known.index(method), "") if method in METHODS else (len(known), method)


# ---- words -----------------------------------------------------------------------------------------------


def display(method: str) -> str:
    return METHODS.get(method, method)


def show(pairs: Settings) -> str:
    return ", ".join(f"{key}={show_value(key, value)}" for key, value in pairs)


def show_value(key: str, value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = one_line(value)
    # Eight characters of a fingerprint are enough to tell two apart; a path of weights is shown in full.
    return text[:8] if key == "dataset_fingerprint" or (key == "weights" and is_hex(text)) else text


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def distinct(values: Iterable) -> list[str]:
    return sorted({one_line(value) for value in values if value not in (None, "")})


def one_line(value: object) -> str:
    return " ".join(str(value).split())


def is_hex(text: str) -> bool:
    return all(c in "0123456789abcdef" for c in text)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

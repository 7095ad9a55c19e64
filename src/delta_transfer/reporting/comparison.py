"""Records of finished runs -> one comparison of methods. Pure functions, no I/O.

A cell is the mean over replicates: runs that differ in nothing but the seed and, on validation data, the fold that
was held out. Whatever else differs splits rows: a setting outside `reg` splits all methods of a dataset and backbone,
a setting inside `reg` only the method which was run with several values of it. Methods may differ from each other in
`reg`, of course.

Runs that `transfer` to a target of random weights, or from other networks than the one that it starts from, answer
another question than fine-tuning: what names their rows is never what names those of fine-tuning.
"""

import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ..records.identity import CAME_LATER, NOT_IDENTITY
from ..records.run_directory import unreadable

METHODS = {
    "l2": "L2",
    "l2_fe": "L2-FE",
    "l2_sp": "L2-SP",
    "delta_noatt": "DELTA w/o ATT",
    "delta": "DELTA",
    "afa": "AFA",
    "afa_spatial": "AFA spatial",
    "afa_channel": "AFA channel",
    "l2_sp_fisher": "L2-SP-Fisher",
    "bss": "BSS",
    "stochnorm": "StochNorm",
    "co_tuning": "Co-Tuning",
    "bi_tuning": "Bi-Tuning",
    "rifle": "RIFLE",
    "lp_ft": "LP-FT",
    "scratch": "Scratch",
    "lwf": "LwF",
    "at": "AT",
    "lwf_at": "LwF+AT",
    "fm": "FM",
    "lwf_fm": "LwF+FM",
    "l2t_w": "L2T-w",
    "l2t_ww": "L2T-ww",
}
METRICS = {
    "test_top1": "Test top-1 accuracy",
    "val_top1": "Validation top-1 accuracy",
    "test_pair_accuracy": "Test pair accuracy",  # of verification runs, in tables of their own
}

# Not what was computed. The seed is what a cell averages over; names are the table's own rows and columns; data and
# weights are compared by fingerprint (`settings`), not by place. A key stands for all that is nested below it.
NOT_SETTINGS = NOT_IDENTITY | {"seed", "dataset.root", "dataset.name", "backbone.weights", "backbone.name"}
# Keys that records of schema 1 lack, with what they meant by that.
SINCE_SCHEMA_2 = {
    **CAME_LATER,
    "task": "classification",
    "arcface.scale": 64.0,
    "arcface.margin": 0.5,
}

Settings = tuple[tuple[str, object], ...]  # ((key, value), ...)
Replicate = tuple[int, int | None]  # seed and fold; None where folds are not averaged over


@dataclass(frozen=True)
class Cell:
    values: dict[Replicate, float]
    runs: list[dict] = field(default_factory=list, repr=False, compare=False)  # their records, in the same order

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single run."""
        return statistics.stdev(self.values.values()) if self.n > 1 else None

    @property
    def val_loss(self) -> float | None:
        """Mean over the runs, if every one recorded it."""
        losses = [run.get("val_loss") for run in self.runs]
        return statistics.fmean(losses) if losses and all(map(is_number, losses)) else None

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.mean:.1f}{spread} ({self.n})"


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
    chosen: list[str] = field(default_factory=list)  # what did best on validation data, one line each (selection.py)
    transfers: bool = False  # every run of it does, in the sense of `transfers`


def problem(record: object, metric: str = "test_top1") -> str | None:
    """Why this record cannot be a part of any comparison, or None."""
    if not isinstance(record, dict):
        return "not a JSON object"
    if record.get("unreadable"):
        return f"summary.json is unreadable: {one_line(record['unreadable'])}"
    if (newer := unreadable(record)) is not None:
        return newer
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

    for (dataset, backbone), runs in grouped(beside_sources(records, metric), dataset_and_backbone):
        for shared, runs_alike in grouped_by_varying(runs, lambda run: settings(run, metric)):
            for method, method_runs in grouped(runs_alike, method_of):
                for reg, same in grouped_by_varying(method_runs, reg_settings):
                    key = (dataset, backbone, shared, reg)
                    row = rows.setdefault(key, Row(*key))
                    row.cells[method] = cell_of(same, metric, warnings)

    ordered = sorted(rows.values(), key=row_order)
    methods = sorted({method for row in ordered for method in row.cells}, key=method_order)
    cells = [cell for row in ordered for cell in row.cells.values()]
    title, notes = title_of(records, metric, cells), describe(records, methods)
    return Comparison(metric, title, methods, ordered, notes, warnings, transfers=all(map(transfers, records)))


def together(comparisons: list[Comparison], metric: str) -> Comparison:
    """Those of `metric` as one, for what is drawn row by row."""
    alike = [comparison for comparison in comparisons if comparison.metric == metric]
    if len(alike) == 1:
        return alike[0]
    methods = sorted({method for one in alike for method in one.methods}, key=method_order)
    return replace(alike[0], methods=methods, rows=[row for one in alike for row in one.rows], transfers=False)


def beside_sources(records: list[dict], metric: str) -> list[dict]:
    """The records, those from random weights alone (Scratch) once for each source that others of their settings had.

    What such a run comes to is the same whatever the others learn from, so that it belongs into each of their rows.
    """

    def view(record: dict) -> tuple:
        rest = {k: v for k, v in settings(record, metric).items() if not within(k, ["source"])}
        return section(record, "dataset")["name"], section(record, "backbone")["name"], tuple(sorted(rest.items()))

    known: dict[tuple, dict[str, list]] = defaultdict(dict)  # by view, the distinct ones
    for record in records:
        if recorded_sources(record):
            known[view(record)].setdefault(show(tuple(sources(record).items())), record["sources"])
    placed = []
    for record in records:
        alone = begins_at_random(record) and not recorded_sources(record)
        found = known.get(view(record), {}) if known and alone else {}
        placed += [record | {"sources": others} for others in found.values()] or [record]
    return placed


def distinct_runs(records: Iterable[dict]) -> list[dict]:
    """Each run once, also one that stands in several rows: the copies there (`beside_sources`) share its config."""
    return list({id(config_of(record)): record for record in records}.values())


def cell_of(runs: list[dict], metric: str, warnings: list[str]) -> Cell:
    kept: dict[Replicate, dict] = {}
    for run in sorted(runs, key=lambda run: replicate(run, metric)):
        key = replicate(run, metric)
        if key in kept:
            same = "settings and seed" if key[1] is None else "settings, seed and fold"
            warnings.append(f"duplicate {run_id(run)}: same {same} as {run_id(kept[key])}, which is kept")
        else:
            kept[key] = run
    return Cell({key: float(run[metric]) for key, run in kept.items()}, list(kept.values()))


# ---- what is said around the table -----------------------------------------------------------------------


def title_of(records: list[dict], metric: str, cells: list[Cell]) -> str:
    rules = distinct(record.get("selection") for record in records)
    selection = f", {' / '.join(rules)}" if rules else ""
    return f"{METRICS[metric]} (%){question_of(records)}{selection}; mean ± sample std over {averaged_over(cells)} (n)"


def question_of(records: list[dict]) -> str:
    """What the title of a table says of targets that are no fine-tuned networks."""
    if not records or not all(map(transfers, records)):
        return ""
    if all(map(begins_at_random, records)):
        return " of targets trained from random weights"
    return " of targets from random weights or beside other source networks"


def averaged_over(cells: list[Cell]) -> str:
    """seeds | folds | seeds and folds; joined by "or" where the cells of a table differ in that."""
    found = set()
    for cell in cells:
        seeds, folds = ({key[i] for key in cell.values} for i in (0, 1))
        found.add(" and ".join(name for name, keys in (("seeds", seeds), ("folds", folds)) if len(keys) > 1))
    held_out_folds = any(fold is not None for cell in cells for _, fold in cell.values)
    return " or ".join(sorted(found - {""})) or ("folds" if held_out_folds else "seeds")


def describe(records: list[dict], methods: list[str]) -> list[str]:
    """Hyper-parameters, settings common to all runs, hardware, versions, commits, times."""
    by_method = dict(grouped(records, method_of))
    notes = []
    for method in methods:
        # Only what all runs of the column share; the rest is in the settings of the rows.
        views = [reg_settings(run) | {"stages": stages(run)} for run in by_method[method]]
        keys = strengths(views[0]) + ["stages"] * (views[0]["stages"] > 1)
        constant = common(views, keys)
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
    return notes


def facts(record: dict) -> dict[str, object]:
    schedule = section(record, "schedule")
    return {
        "iterations": record.get("iterations", schedule.get("iterations")),
        "batch_size": schedule.get("batch_size"),
        "lr": schedule.get("lr"),
        "image_size": section(record, "backbone").get("image_size"),
        "n_train": record.get("n_train"),
        "n_val": record.get("n_val") or None,
        "n_test": None if folds(record) else record.get("n_test"),  # runs on folds do not look at it
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


def folds(record: dict) -> int | None:
    """Into how many folds the training part was cut, if it was."""
    count = section(record, "split").get("folds")
    return count if isinstance(count, int) else None


def replicate(record: dict, metric: str) -> Replicate:
    fold = section(record, "split").get("fold") or 0
    return seed(record), fold if metric == "val_top1" and folds(record) else None


def method_of(record: dict) -> str:
    return section(record, "reg")["name"]


def dataset_and_backbone(record: dict) -> tuple[str, str]:
    """The names of a row: cub, resnet18 | resnet34 -> resnet18 | resnet18 (random weights)."""
    backbone, names = section(record, "backbone")["name"], names_of_sources(record)
    if names:
        backbone = f"{' + '.join(names)} -> {backbone}"
    elif begins_at_random(record):
        backbone = f"{backbone} (random weights)"
    return section(record, "dataset")["name"], backbone


def begins_at_random(record: dict) -> bool:
    return section(record, "backbone").get("weights") == "none"


def transfers(record: dict) -> bool:
    """Whether the run is no fine-tuning: its target begins at random, or learns from networks that it is no copy of."""
    return begins_at_random(record) or bool(recorded_sources(record))


def settings(record: dict, metric: str) -> dict[str, object]:
    """All that must agree between runs of one row, outside `reg`."""
    # Each fold is validated on images of its own, and together they are the training part: their mean is wanted.
    ignored = NOT_SETTINGS | {"reg"} | ({"split.fold"} if metric == "val_top1" else set())
    flat = flatten(SINCE_SCHEMA_2) | flatten(config_of(record))
    kept = {k: v for k, v in flat.items() if not within(k, ignored)}
    # Each stage takes the whole schedule: runs are compared where they took the same in all.
    for length in ("schedule.iterations", "schedule.epochs"):
        if is_number(kept.get(length)):
            kept[length] *= stages(record)
    # The same weights may lie in different places, so a path is looked at only where there is no fingerprint.
    weights = record.get("weights_fingerprint") or flat.get("backbone.weights")
    fingerprint, selection = record.get("dataset_fingerprint"), record.get("selection")
    named = {"dataset_fingerprint": fingerprint, "weights": weights, "selection": selection}
    return kept | sources(record) | flatten(named)


def recorded_sources(record: dict) -> list[dict]:
    """The networks that a run learned from, where they are not the one that the target started from."""
    known = record.get("sources")
    return [source for source in known if isinstance(source, dict)] if isinstance(known, list) else []


def names_of_sources(record: dict) -> list[str]:
    return [str(source.get("name")) for source in recorded_sources(record)]


def sources(record: dict) -> dict[str, object]:
    known = recorded_sources(record)
    names = " + ".join(f"{s.get('name')} {str(s.get('weights_fingerprint'))[:8]}" for s in known)
    return {"source": names or None, "source.taps": json.dumps([s.get("taps") for s in known]) if known else None}


def stages(record: dict) -> int:
    """How many, each as long as the schedule, the run was trained in."""
    found = record.get("stages")
    return len(found) if isinstance(found, list) and found else 1


def reg_settings(record: dict) -> dict[str, object]:
    ignored = NOT_SETTINGS | {"reg.name"}
    flat = flatten(section(record, "reg"), "reg.")
    # A sum's terms have the same keys one level deeper.
    return {k: v for k, v in flat.items() if not within(k, ignored) and not k.endswith(".attention.forward_images")}


def strengths(reg: dict[str, object]) -> list[str]:
    """The keys of `reg_settings` that weigh a method's penalties, of a sum those of its terms."""
    named = ("alpha", "channel_alpha", "temperature")
    own = [f"reg.{name}" for name in named]
    return own + [key for key in reg if re.fullmatch(rf"reg\.terms\.[^.]+\.({'|'.join(named)})", key)] + ["reg.beta"]


def within(key: str, names: Iterable[str]) -> bool:
    """Whether `key` is one of `names` or nested below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


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


def label_of(method: str, reg: Settings) -> str:
    """A method with the settings that tell it apart, as they stand below `reg`."""
    return ", ".join(filter(None, [display(method), show(reg).replace("reg.", "")]))


def show(pairs: Settings) -> str:
    return ", ".join(f"{key}={show_value(key, value)}" for key, value in pairs)


def show_value(key: str, value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = one_line(value)
    # Eight characters of a fingerprint are enough to tell two apart; a path of weights is shown in full.
    return text[:8] if key == "dataset_fingerprint" or (key == "weights" and is_hex(text)) else text


def distinct(values: Iterable) -> list[str]:
    return sorted({one_line(value) for value in values if value not in (None, "")})


def one_line(value: object) -> str:
    return " ".join(str(value).split())


def is_hex(text: str) -> bool:
    return all(c in "0123456789abcdef" for c in text)


def is_number(value: object) -> bool:
    # Not math.isfinite, which integers beyond the range of floats break.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

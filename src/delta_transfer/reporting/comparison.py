"""Records of finished runs -> one comparison of methods. Pure functions, no I/O.

A cell is the mean over replicates: runs that differ only in the seed and in the fold, which was held out for validation
or, in a data set of folds, tested. Any other difference splits rows. A setting outside `reg` splits all methods of a
dataset and backbone; a setting inside `reg` splits only the method that was run with several values of it. Methods may
differ from each other in `reg`.

Runs that transfer to a target with random weights, or from networks that it does not start from, answer another
question than fine-tuning. Their rows have other names and never mix with those of fine-tuning.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from ..common.cores import NOTABLE
from ..common.style import method_order
from ..records.metrics import ACCURACY, METRICS, Metric
from ..records.reading import (
    Record,
    begins_at_random,
    config_of,
    is_number,
    method_of,
    method_title,
    one_line,
    recorded_sources,
    run_id,
    section,
    stages,
    transfers,
)
from .record_views import (
    Replicate,
    Settings,
    common,
    dataset_and_backbone,
    distinct,
    facts,
    identity_of,
    reg_settings,
    replicate,
    settings,
    show,
    sources,
    strengths,
    within,
)

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Place = tuple[str, str, Settings]  # data set, backbone, settings outside reg

SHORT = 24  # most letters of a data set's title that fits into a line


@dataclass(frozen=True)
class Cell:
    values: dict[Replicate, float]
    runs: list[Record] = field(default_factory=list, repr=False, compare=False)  # their records, in the same order
    kind: Metric = ACCURACY

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values())

    @property
    def merit(self) -> float:
        """The mean, signed so that more is better."""
        return self.kind.merit(self.mean)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single run."""
        return statistics.stdev(self.values.values()) if self.n > 1 else None

    @property
    def val_loss(self) -> float | None:
        return mean_of_all(self.runs, "val_loss")

    def __str__(self) -> str:
        digits = self.kind.digits
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread} ({self.n})"


def recorded(runs: list[Record], key: str) -> list[float]:
    """The values of the runs that have the key."""
    return [run[key] for run in runs if is_number(run.get(key))]


def mean_of_all(runs: list[Record], key: str) -> float | None:
    """The mean over the runs; None unless every run recorded the key."""
    values = recorded(runs, key)
    return statistics.fmean(values) if values and len(values) == len(runs) else None


def waited(runs: list[Record]) -> bool:
    """Whether other programs made the runs wait so long that their times cannot be compared."""
    seconds, processor = (mean_of_all(runs, key) for key in ("train_seconds", "train_processor_seconds"))
    return seconds is not None and processor is not None and seconds > NOTABLE * processor


@dataclass(frozen=True)
class Row:
    dataset: str
    backbone: str
    shared: Settings  # outside reg: the differences from other rows of its dataset and backbone
    reg: Settings  # inside reg: the differences from other rows of a method with several settings
    cells: dict[str, Cell] = field(default_factory=dict)  # by method; a method without runs is absent

    @property
    def settings(self) -> str:
        return show(self.shared + self.reg)

    @property
    def place(self) -> Place:
        """The cells of all rows with the same place can be compared."""
        return self.dataset, self.backbone, self.shared


class Result(NamedTuple):
    """A cell and its place in the table."""

    method: str
    row: Row
    cell: Cell

    @property
    def reg(self) -> Settings:
        return self.row.reg


@dataclass(frozen=True)
class Comparison:
    metric: str
    measured: str  # what the numbers are, in words
    over: str  # the replicates of the means: seeds | folds | seeds and folds
    methods: list[str]
    rows: list[Row]
    notes: list[str]  # for the reader, under the table, one line each
    warnings: list[str]  # for the user who makes the table, one line each
    chosen: list[str] = field(default_factory=list)  # the best choices on validation data, one line each (selection.py)
    transfers: bool = False  # whether all of its runs transfer between networks
    titles: dict[str, str] = field(default_factory=dict)  # display names by method, as the records have them
    datasets: dict[str, str] = field(default_factory=dict)  # display names of data sets
    on_folds: list[Record] = field(default_factory=list, repr=False, compare=False)  # runs on folds, not tested

    @property
    def kind(self) -> Metric:
        return METRICS[self.metric]

    @property
    def results(self) -> list[Result]:
        """Row by row."""
        return [Result(m, row, row.cells[m]) for row in self.rows for m in self.methods if m in row.cells]

    @property
    def places(self) -> list[tuple[Place, list[Result]]]:
        """The results that can be compared with each other, method by method."""
        by_place = grouped(self.results, lambda one: one.row.place)
        return [(place, sorted(found, key=lambda one: self.methods.index(one.method))) for place, found in by_place]

    @property
    def paired_by(self) -> str:
        """What the runs of a pair share."""
        return "fold" if "folds" in self.over else "seed"

    @property
    def title(self) -> str:
        return f"{self.measured}; mean ± sample std over {self.over} (n)"

    def display(self, method: str) -> str:
        return self.titles.get(method, method)

    def dataset_title(self, dataset: str) -> str:
        return self.datasets.get(dataset, dataset)

    def place_title(self, place: Place) -> str:
        """The words of a title for rows that can be compared."""
        dataset, backbone, shared = place
        return ", ".join(filter(None, [self.dataset_title(dataset), backbone, show(shared)]))

    def label(self, method: str, reg: Settings) -> str:
        """A method with the settings that distinguish it, named as below `reg`."""
        return ", ".join(filter(None, [self.display(method), show(reg).replace("reg.", "")]))


def compare(records: Iterable[Record], metric: str = "test_top1") -> Comparison:
    """The comparison of `records` by `metric`. No record may have a `problem`."""
    records = sorted(records, key=run_id)
    rows: dict[tuple[str, str, Settings, Settings], Row] = {}
    warnings: list[str] = []

    for (dataset, backbone), runs in grouped(beside_sources(records, metric), dataset_and_backbone):
        for shared, runs_alike in grouped_by_varying(runs, lambda run: settings(run, metric)):
            for method, method_runs in grouped(runs_alike, method_of):
                for reg, same in grouped_by_varying(method_runs, reg_settings):
                    key = (dataset, backbone, shared, reg)
                    row = rows.setdefault(key, Row(*key))
                    row.cells[method] = cell_of(same, metric, warnings)

    ordered = [rows[key] for key in sorted(rows, key=lambda key: (*key[:2], *map(settings_order, key[2:])))]
    methods = sorted({method for row in ordered for method in row.cells}, key=method_order)
    cells = [cell for row in ordered for cell in row.cells.values()]
    titles = {m: t for r in reversed(records) if (t := method_title(r)) != (m := method_of(r))}  # the first one found
    datasets = dataset_titles(records)
    words = measured_in(records, metric), averaged_over(cells)
    made = Comparison(metric, *words, methods, ordered, [], warnings, titles=titles, datasets=datasets)
    return replace(made, notes=describe(records, made), transfers=all(map(transfers, records)))


def dataset_titles(records: Iterable[Record]) -> dict[str, str]:
    """The titles of data sets by name, if they are short and belong to one name."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        titles, dataset = record.get("titles"), section(record, "dataset")
        title = one_line(titles.get("dataset")) if isinstance(titles, dict) and titles.get("dataset") else ""
        if 0 < len(title) <= SHORT and dataset.get("reader", dataset["name"]) != "folder":
            found[title].add(dataset["name"])
    return {name: title for title, names in found.items() if len(names) == 1 for name in names}


def together(comparisons: list[Comparison], metric: str) -> Comparison:
    """All comparisons of `metric` as one, for charts that draw row by row."""
    alike = [comparison for comparison in comparisons if comparison.metric == metric]
    if len(alike) == 1:
        return alike[0]
    methods = sorted({method for one in alike for method in one.methods}, key=method_order)
    titles = {method: title for one in reversed(alike) for method, title in one.titles.items()}
    rows = [row for one in alike for row in one.rows]
    datasets = {name: title for one in alike for name, title in one.datasets.items()}
    return replace(alike[0], methods=methods, rows=rows, titles=titles, datasets=datasets, transfers=False)


def beside_sources(records: list[Record], metric: str) -> list[Record]:
    """The records, in which a run without a source (Scratch) appears once for each source of others with its settings.

    Its result does not depend on the sources of the others, so that it belongs to each of their rows.
    """

    def view(record: Record) -> Hashable:
        rest = {key: value for key, value in settings(record, metric).items() if not within(key, ["source"])}
        return section(record, "dataset")["name"], section(record, "backbone")["name"], tuple(sorted(rest.items()))

    known: dict[Hashable, dict[str, list[Record]]] = defaultdict(dict)  # by view, the distinct ones
    for record in records:
        if recorded_sources(record):
            known[view(record)].setdefault(show(tuple(sources(record).items())), record["sources"])
    placed = []
    for record in records:
        alone = begins_at_random(record) and not recorded_sources(record)
        found = known.get(view(record), {}) if known and alone else {}
        placed += [record | {"sources": others} for others in found.values()] or [record]
    return placed


def distinct_runs(records: Iterable[Record]) -> list[Record]:
    """Each run once, even if it is in several rows: its copies (`beside_sources`) share its config."""
    return list({id(config_of(record)): record for record in records}.values())


def cell_of(runs: list[Record], metric: str, warnings: list[str]) -> Cell:
    kept: dict[Replicate, Record] = {}
    for run in sorted(runs, key=lambda run: replicate(run, metric)):
        key = replicate(run, metric)
        if key in kept:
            same = "settings and seed" if key[1] is None else "settings, seed and fold"
            warnings.append(f"duplicate {run_id(run)}: same {same} as {run_id(kept[key])}, which is kept")
        else:
            kept[key] = run
    return Cell({key: float(run[metric]) for key, run in kept.items()}, list(kept.values()), METRICS[metric])


# ---- words around the table ------------------------------------------------------------------------------


def measured_in(records: list[Record], metric: str) -> str:
    rules = distinct(record.get("selection") for record in records)
    selection = f", {' / '.join(rules)}" if rules else ""
    return f"{METRICS[metric].axis}{question_of(records)}{selection}"


def question_of(records: list[Record]) -> str:
    """Words in the title of a table whose targets are not fine-tuned networks."""
    if not records or not all(map(transfers, records)):
        return ""
    if all(map(begins_at_random, records)):
        return " of targets trained from random weights"
    return " of targets from random weights or beside other source networks"


def averaged_over(cells: list[Cell]) -> str:
    """seeds | folds | seeds and folds; joined by "or" if the cells of a table differ in that."""
    found = set()
    for cell in cells:
        seeds, folds = ({key[i] for key in cell.values} for i in (0, 1))
        found.add(" and ".join(name for name, keys in (("seeds", seeds), ("folds", folds)) if len(keys) > 1))
    held_out_folds = any(fold is not None for cell in cells for _, fold in cell.values)
    return " or ".join(sorted(found - {""})) or ("folds" if held_out_folds else "seeds")


def describe(records: list[Record], comparison: Comparison) -> list[str]:
    """Hyper-parameters, settings common to all runs, hardware, versions, commits."""
    by_method = dict(grouped(records, method_of))
    chosen: list[tuple[str, str]] = []
    for method in comparison.methods:
        # Only settings that all runs of the column share; the others are in the rows.
        views = [reg_settings(run) | {"stages": stages(run)} for run in by_method[method]]
        keys = strengths(views[0]) + ["stages"] * (views[0]["stages"] != 1)
        if constant := common(views, keys):
            chosen.append((comparison.display(method), show(constant).replace("reg.", "")))
    alike = [f"{', '.join(name for name, _ in same)} ({words})" for words, same in grouped(chosen, lambda one: one[1])]
    notes = [f"Settings: {'; '.join(alike)}"] if alike else []
    if constant := common([facts(record) for record in records], list(facts({}))):
        notes.append(f"All runs: {show(constant)}")
    devices = [str(record["device"]) for record in records if record.get("device")]
    if devices := distinct(re.sub(r"\b1 threads$", "1 thread", device) for device in devices):
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


# ---- grouping and order ----------------------------------------------------------------------------------


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> list[tuple[Key, list[Item]]]:
    """(key, items) pairs in the order of first appearance."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.items())


def grouped_by_varying(
    records: list[Record], view: Callable[[Record], dict[str, object]]
) -> list[tuple[Settings, list[Record]]]:
    """Groups of records that agree in all of `view`, named by the keys that vary among `records`.

    A key that a record lacks is newer than the run. Its absence means the default, which is known from any record that
    has the key but not in its identity; otherwise it differs from all values.
    """
    views = [view(record) for record in records]
    keys = sorted({key for v in views for key in v})
    later = [key for key in keys if any(key not in v for v in views)]
    identities = [identity_of(record) if later else {} for record in records]
    defaults = {
        key: v[key] for key in later for v, own in zip(views, identities, strict=True) if own and key in v.keys() - own
    }
    filled = [{key: v.get(key, defaults.get(key, "?")) for key in keys} for v in views]
    varying = [key for key in keys if len({v[key] for v in filled}) > 1]
    groups: dict[Settings, list[Record]] = defaultdict(list)
    for record, v in zip(records, filled, strict=True):
        groups[tuple((key, v[key]) for key in varying)].append(record)
    return list(groups.items())


def settings_order(pairs: Settings) -> tuple[object, ...]:
    """Sorts by keys first, so that the rows of one sweep stay together, then by values in numeric order."""
    return [key for key, _ in pairs], [(0, v, "") if is_number(v) else (1, 0, str(v)) for _, v in pairs]

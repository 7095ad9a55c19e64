"""Chooses the reg settings of each method that did best on validation data, and makes the command of the final runs.

Pure functions, no I/O. Hold-out and cross-validation have the same rule; test accuracies have no part in it.
"""

import math
import re
import shlex
from dataclasses import dataclass

from ..records.reading import Record, config_of, folds, is_number, section
from .comparison import Comparison, Result, grouped, settings_order
from .record_views import Replicate, Settings, common, reg_settings, settings, show, strengths, validates

# Groups and keys that final runs do not take over: they train on all images, with their own seeds, in any place.
NOT_FINAL = {"split", "seed", "device", "dry_run"}

# The overrides that a command made from records may have (`kind_of`).
GROUPS = "dataset|backbone|reg|schedule|optimizer|average|arcface|experiment|split"
SINGLE = {"source", "precision", "compile", "deterministic", "task", "seed"}
INPUTS = {"dataset.root", "dataset.train_root", "dataset.labels"}
PLACES = {
    *("results_dir", "cache_dir", "data_dir", "device", "logging", "model_card", "dry_run", "retry_failed"),
    "dataset.download",
}
NAME, PLAIN = r"[\w-]+", r"[\w.,:+\[\]{} -]*"


@dataclass(frozen=True)
class Choice:
    what: str  # the method and where: "DELTA on cub, resnet18"
    best: Result
    tried: int  # number of candidates
    remark: str  # how the choice was made

    def __str__(self) -> str:
        # A value that all candidates share is not named in the table, but was chosen here.
        runs = [reg_settings(run) for run in self.best.cell.runs]
        values = self.best.reg or common(runs, strengths(runs[0]))
        words = filter(None, [show(values), str(self.best.cell), self.remark])
        return f"best on validation: {self.what}: {', '.join(words)}"


@dataclass(frozen=True)
class Selection:
    choices: list[Choice]
    undecided: list[str]  # methods without a choice, with the reason, one line each
    warnings: list[str]


def choose(comparison: Comparison, failed: list[Record]) -> Selection:
    """The best candidate of each method, dataset, backbone and setting outside reg. failed: records of failed runs."""
    if not validates(comparison.metric):
        raise ValueError(f"settings are chosen on validation data, not by {comparison.metric}")
    made = Selection([], [], [])
    for (dataset, backbone, shared), results in comparison.places:
        place = ", ".join(filter(None, [dataset, backbone, show(shared)]))
        for method, candidates in grouped(results, lambda one: one.method):
            hopeless = without_result(candidates, failed)
            choose_one(f"{comparison.display(method)} on {place}", candidates, hopeless, made)
    return made


def choose_one(what: str, candidates: list[Result], hopeless: list[Settings], made: Selection) -> None:
    """Adds the best of `candidates` to `made`, or the reason why there is none. hopeless: settings that only failed."""
    ran = {key for candidate in candidates for key in candidate.cell.values}
    if nobody := planned(candidates) - ran:
        made.warnings.append(f"incomplete: {what}: no run with {names_of(nobody, ran | nobody)}")
    # The folds that a candidate lacks may be the hard ones, so that its mean cannot be compared.
    compared = [candidate for candidate in candidates if candidate.cell.values.keys() == ran]
    for candidate in candidates:
        if missing := ran - candidate.cell.values.keys():
            made.warnings.append(f"not compared: {what}, {show(candidate.reg)}: lacks {names_of(missing, ran)}")
    made.warnings.extend(f"not compared: {what}, {show(reg)}: every run failed" for reg in hopeless)
    if not compared:
        made.undecided.append(f"no choice: {what}: every candidate lacks a run that another one has")
        return
    best, tie = best_of(compared)
    tried = len(candidates) + len(hopeless)
    if len(compared) > 1:
        remark = f"best of {len(compared)}"
        remark += f" ({tried - len(compared)} more not compared)" if tried > len(compared) else ""
    else:
        remark = "the only setting" if tried == 1 else f"the only complete one of {tried}"
    made.choices.append(Choice(what, best, tried, remark + tie + at_the_edge(best, compared)))


def best_of(candidates: list[Result]) -> tuple[Result, str]:
    """The candidate with the best mean, then the lowest mean loss, then the smallest settings; and words on a tie."""
    top = max(candidate.cell.merit for candidate in candidates)
    # Accuracies on few validation images are often equal up to rounding of the mean.
    equal = [candidate for candidate in candidates if math.isclose(candidate.cell.merit, top)]
    losses = [loss for candidate in equal if (loss := candidate.cell.val_loss) is not None]
    left = equal
    if len(losses) == len(equal):
        left = [one for one, loss in zip(equal, losses, strict=True) if math.isclose(loss, min(losses))]
    best = min(left, key=lambda candidate: settings_order(candidate.reg))
    if len(left) > 1:
        return best, f"; a tie with {others(left, best)}: the smallest is taken"
    if len(equal) > 1:
        return best, f"; as good as {others(equal, best)}, lower validation loss"
    return best, ""


def at_the_edge(best: Result, compared: list[Result]) -> str:
    """Words about a value that is the smallest or largest of three or more, since a value beyond it may be better."""
    words = ""
    for key, value in best.reg:
        values = {dict(candidate.reg)[key] for candidate in compared}
        tried = [one for one in values if is_number(one)]
        if len(tried) == len(values) > 2 and value in (min(tried), max(tried)):
            words += f"; {key} is the {'smallest' if value == min(tried) else 'largest'} that was tried"
    return words


def without_result(candidates: list[Result], failed: list[Record]) -> list[Settings]:
    """The reg settings, of the method and place of `candidates`, whose runs all failed."""
    runs = [run for candidate in candidates for run in candidate.cell.runs]
    finished = [reg_settings(run) for run in runs]
    lost = [reg_settings(run) for run in failed if group_of(run) == group_of(runs[0])]
    # They are named by their differences from the finished ones.
    varying = [
        tuple((k, v) for k, v in sorted(reg.items()) if any(other.get(k) != v for other in finished))
        for reg in lost
        if reg not in finished
    ]
    return sorted(set(varying), key=settings_order)


def group_of(record: Record) -> tuple[object, ...]:
    """Equal for a candidate and a failed run of the same method and place."""
    if not config_of(record).get("source"):  # a copy by `beside_sources` names the sources of other runs
        record = record | {"sources": None}
    names = [section(record, group).get("name") for group in ("dataset", "backbone", "reg")]
    return names, settings(record, "val_top1")


def planned(candidates: list[Result]) -> set[Replicate]:
    """Every fold, for every seed that was run."""
    runs = [run for candidate in candidates for run in candidate.cell.runs]
    seeds = {seed for candidate in candidates for seed, _ in candidate.cell.values}
    return {(seed, fold) for seed in seeds for run in runs for fold in range(folds(run) or 0)}


# ---- the final runs --------------------------------------------------------------------------------------


def command(choice: Choice, seeds: int, with_paths: bool = False) -> str | None:
    """The shell command of the final runs; None if no record has overrides of its run that are not refused.

    with_paths: whether files and folders are taken from the records; else the command has ??? in their place, which
    delta-run refuses.
    """
    for run in choice.best.cell.runs:
        overrides = run.get("overrides")
        # A run validates only by an override, so that an empty list cannot be right.
        if not overrides or not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
            continue
        shared = final(overrides)
        # A chosen value is also written if it was the default.
        chosen = [
            f"{key}={value}" for key, value in choice.best.reg if not any(o.startswith(f"{key}=") for o in shared)
        ]
        if "refused" not in map(kind_of, [*shared, *chosen]):
            kept = [*filter(None, (shown(override, with_paths) for override in shared)), *chosen]
            return " ".join(["delta-run -m", *map(shlex.quote, kept), f"seed='range({seeds})'"])
    return None


def refused(choice: Choice) -> list[str]:
    """The overrides in the records of a choice that no command is made from."""
    found = [words for run in choice.best.cell.runs if isinstance(words := run.get("overrides"), list)]
    texts = [one for words in found for one in words if isinstance(one, str)]
    return sorted({one for one in final(texts) if kind_of(one) == "refused"})


def kind_of(override: object) -> str:
    """The kind of an override in a record, whose author need not be trusted.

    setting: a choice by name, or a plain value of a method, a schedule or another group. input: names a file or folder
    that the result depends on. place: says where and how a run is made. refused: everything else, such as options of
    Hydra, interpolations and calls.
    """
    parts = (
        re.fullmatch(r"[+]{0,2}([a-z]\w*)(@[\w.]+)?((?:\.\w+)*)=(.*)", override) if isinstance(override, str) else None
    )
    if isinstance(override, str) and re.fullmatch(rf"~({GROUPS})(\.\w+)+", override):
        return "setting"
    if parts is None or re.search(r"[$\\\n\r]", parts[4]):
        return "refused"
    group, package, path, value = parts.groups()
    key = group + path
    if package:
        return "setting" if group == "reg" and package.startswith("@reg.") and re.fullmatch(NAME, value) else "refused"
    if key in PLACES:
        return "place"
    if key in INPUTS or (
        group in ("dataset", "backbone", "source") and re.search(r"[/~]|\.(pth?|safetensors|ckpt|bin)\b", value)
    ):
        return "input"
    known = key in SINGLE or re.fullmatch(GROUPS, group)
    return "setting" if known and re.fullmatch(PLAIN if path or key in SINGLE else NAME, value) else "refused"


def shown(override: str, with_paths: bool) -> str:
    """An override as a word of a command; "" for one that is left out."""
    kind, key = kind_of(override), override.partition("=")[0]
    if kind == "place":
        return override if with_paths and key in ("results_dir", "cache_dir", "data_dir") else ""
    return f"{key}=???" if kind == "input" and not with_paths else override


def final(overrides: list[str]) -> list[str]:
    """Those of `overrides` that the final runs keep; for each key the last one."""
    kept: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0]
        if key.lstrip("+~").partition(".")[0] not in NOT_FINAL:
            kept.pop(key, None)  # so that the last one keeps its place
            kept[key] = override
    return list(kept.values())


# ---- words -----------------------------------------------------------------------------------------------


def others(candidates: list[Result], one: Result) -> str:
    return " and ".join(show(candidate.reg) for candidate in candidates if candidate is not one)


def names_of(replicates: set[Replicate], among: set[Replicate]) -> str:
    """Text such as: fold 1, fold 2 | seed 0 fold 2 | seed 1. The seed is named only if it differs."""
    several_seeds = len({seed for seed, _ in among}) > 1
    names = []
    for seed, fold in sorted(replicates):
        by_seed = [f"seed {seed}"] if several_seeds or fold is None else []
        names.append(" ".join(by_seed + ([] if fold is None else [f"fold {fold}"])))
    return ", ".join(names)

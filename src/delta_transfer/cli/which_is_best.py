"""delta-run +experiment=which_is_best dataset.root=photos: which method is best on these images, and by how much.

It makes several sweeps in one command. The first ones run every backbone, method and alpha on folds of the training
images. It chooses the simplest that is as good as the best on the held-out images (prefer=simple), or the best
(prefer=best). The last ones train the choice, L2 (the baseline) and L2-FE on all training images with several seeds.
Only these runs see the test images, which measure the choice and do not change it. Finished runs are skipped, as in any
sweep. budget=45m or preset=good decides what is compared, and how thoroughly (experiment/budget.py).
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from ..common import tables
from ..common.console import duration, log
from ..common.errors import UserError
from ..common.options import describe, require
from ..common.style import method_order
from ..common.tables import Table
from ..data import load_dataset
from ..engine.config import RunConfig
from ..experiment import budget
from ..experiment.choosing import (
    SELECT,
    Made,
    alpha_of,
    best_of,
    conclusion,
    folds_of,
    named,
    number_of_folds,
    on_all_folds,
    training_images,
    without_a_gpu,
)
from ..experiment.costs import seconds_beside_steps
from ..experiment.planning import Plan
from ..methods import METHODS
from ..models.zoo import not_downloaded
from ..records.reading import Record, method_of, section
from ..reporting import sections
from ..reporting.comparison import compare
from ..reporting.record_views import problem
from ..reporting.rivals import RULES, in_words, rivals_of, simplest
from ..reporting.selection import choose
from .explain import OF_WHICH_IS_BEST
from .sweep import values_of

# From the published values, for thousands of images, down to the best ones for hundreds in results/published.
ALPHAS = {
    "l2_sp": ["0.01", "0.1"],
    "delta_noatt": ["0.0001", "0.001", "0.01"],
    "delta": ["0.0001", "0.001", "0.01"],
}
LIMITS = ("budget", "preset")
COMPARED = ("reg", "reg.alpha", "backbone", "seed", "split.folds")
STEPS, BATCHES = {"schedule.iterations", "schedule.epochs"}, {"schedule", "schedule.batch_size"}
SIZE = {"backbone.image_size", "backbone.resize"}
ATTENTION = "reg.attention.method"

Asked = dict[str, list[str]]
Compose = Callable[[list[str]], tuple[RunConfig, dict[str, str]]]
Sweep = Callable[[list[str]], list[Made]]


@dataclass(frozen=True)
class Result:
    lines: list[str | Table]  # sentences and tables
    choice: budget.Place | None = None
    made: list[Made] = field(default_factory=list)


@dataclass(frozen=True)
class Grid:
    """What is compared, and the words of its runs."""

    rest: list[str]  # of all runs
    backbones: dict[str, list[str]]  # words, by name
    methods: dict[str, list[str]]  # words, by name; L2, the baseline, is the first
    alphas: dict[str, list[str]]  # of the methods that are tried with several
    folds: int
    seeds: list[str]
    configs: dict[budget.Place, RunConfig]  # of a run of each backbone and method
    images: dict[str, int]  # for training, by class
    prefer: str  # which of the equally good choices is taken
    select: str  # the measure on held-out and on test images

    def words(self, backbone: str, method: str) -> list[str]:
        return [*self.rest, *self.backbones[backbone], f"reg={method}", *self.methods[method]]

    def on_folds(self, backbone: str, method: str) -> list[str]:
        strength = [f"reg.alpha={','.join(self.alphas[method])}"] if method in self.alphas else []
        held_out = [f"split.folds={self.folds}", f"split.fold={','.join(map(str, range(self.folds)))}"]
        return [*self.words(backbone, method), *strength, f"seed={self.seeds[0]}", *held_out]

    def final(self, backbone: str, method: str, alpha: float | None = None) -> list[str]:
        strength = [f"reg.alpha={alpha}"] if method in self.alphas and alpha is not None else []
        return [*self.words(backbone, method), *strength, "split.folds=null", f"seed={','.join(self.seeds)}"]

    def in_final(self, method: str) -> list[str]:
        """The methods of the final runs if `method` was chosen."""
        return list(dict.fromkeys([*(one for one in budget.BASELINES if one in self.methods), method]))

    def backbone_of(self, record: Record) -> str:
        name = section(record, "backbone")["name"]
        return next(one for one in self.backbones if self.configs[one, "l2"].backbone.name == name)

    def planned(self, plan: budget.Chosen) -> "Grid":
        """The part that a plan keeps, with the plan's settings. Seeds that the command names stay as they are."""
        level, configs = plan.level, self.configs
        set_by_level = {one: budget.settings(level, configs[one, "l2"], plan.images) for one in level.backbones}
        return replace(
            self,
            backbones={
                one: [*self.backbones[one], *(f"{key}={value}" for key, value in values.items())]
                for one, values in set_by_level.items()
            },
            methods={one: words for one, words in self.methods.items() if one in level.methods},
            folds=level.folds,
            seeds=self.seeds if len(self.seeds) == level.seeds else [str(seed) for seed in range(level.seeds)],
        )


def compare_methods(words: list[str], compose_first_job: Compose, sweep: Sweep) -> list[str | Table]:
    """Makes the comparison that a command's `words` ask for; returns its result in sentences and tables.

    compose_first_job: composes the first job of a command and returns the parameters of its sweep, too.
    sweep: carries a command out.
    """
    began = time.monotonic()
    asked, of_methods, rest = asked_and_rest(words)
    limits = {key: ",".join(asked.pop(key)) for key in LIMITS if key in asked}
    levels = levels_for(limits, words, asked) if limits else []
    if not levels:
        return choose_and_train(grid_of(asked, of_methods, rest, compose_first_job), sweep).lines
    # Everything that a level may compare is composed now, so that misspelt words are found.
    asked |= {"backbone": several(level.backbones for level in levels), "reg": several(one.methods for one in levels)}
    options = [each.name for one in asked["reg"] if one in METHODS for each in describe(METHODS[one].options)]
    if ATTENTION.removeprefix("reg.") in options and ATTENTION not in dict(of_methods):
        of_methods = [*of_methods, (ATTENTION, f"{ATTENTION}=taylor")]
    grid = grid_of(asked, of_methods, rest, compose_first_job)
    config = grid.configs[next(iter(grid.backbones)), "l2"]
    path = budget.plan_path(config.results_dir, words)
    plan = budget.read_plan(path)
    if plan:
        log.info(f"The plan of this command's first start is in {path}. Delete it, and the command plans anew.")
    else:
        plan = plan_of(grid, levels, limits, began)
        if not config.dry_run:
            budget.write_plan(path, plan)
    grid = grid.planned(plan)
    said = [
        f"Planned: {plan.level}. It takes about {duration(plan.estimate.total)}, one run after the other.",
        plan.more,
    ]
    if config.dry_run:
        networks = {one: grid.configs[one, "l2"].backbone for one in grid.backbones}
        absent = [f"Weights of {one}: {why}" for one, network in networks.items() if (why := not_downloaded(network))]
        return [*said, *absent, "The command without dry_run=true measures anew, and keeps its plan."]
    for line in said:
        log.info(line)
    result = choose_and_train(grid, sweep)
    return [*result.lines, *against_estimate(plan.estimate, result, time.monotonic() - began)]


def several(groups: Any) -> list[str]:
    return list(dict.fromkeys(one for group in groups for one in group))


# --- What is compared ---


def grid_of(asked: Asked, of_methods: list[tuple[str, str]], rest: list[str], compose: Compose) -> Grid:
    """Composes every backbone and method with its words, so that misspelt words are found now."""
    first = [f"backbone={asked['backbone'][0]}"] if "backbone" in asked else []
    config, usual = compose([*rest, *first, "reg=l2"])
    asked = asked_and_rest([f"{key}={values}" for key, values in usual.items()])[0] | asked
    folds = number_in(asked["split.folds"])
    prefer, select = (one_of(key, asked, known) for key, known in (("prefer", RULES), ("select", SELECT)))
    methods = ["l2", *(method for method in asked["reg"] if method != "l2")]  # the baseline is always there
    options = {method: compose([*rest, *first, f"reg={method}"])[0].reg for method in methods}
    own = {method: [w for key, w in of_methods if has(options[method], key)] for method in methods}
    alphas = {method: ALPHAS[method] for method in methods if method in ALPHAS}
    if "reg.alpha" in asked:
        of_methods = [*of_methods, ("reg.alpha", f"reg.alpha={','.join(asked['reg.alpha'])}")]
        alphas = dict.fromkeys([m for m in methods if has(options[m], "reg.alpha")], asked["reg.alpha"])
    for key, word in of_methods:
        require(any(has(reg, key) for reg in options.values()), f"{word}: none of {', '.join(methods)} has it.")
    for method in methods:
        for strength in [[f"reg.alpha={alpha}"] for alpha in alphas.get(method, [])] or [[]]:
            options[method] = compose([*rest, *first, f"reg={method}", *own[method], *strength])[0].reg
    backbones = {name: [f"backbone={name}"] for name in asked.get("backbone", [])} or {config.backbone.name: []}
    networks = {name: compose([*rest, *words, "reg=l2"])[0] if words else config for name, words in backbones.items()}
    require(
        len({network.backbone.name for network in networks.values()}) == len(networks),
        f"backbone={','.join(backbones)}: two of them are the same network.",
    )
    configs = {(one, method): networks[one].replace(reg=options[method]) for one in networks for method in methods}
    images = training_images(config)
    return Grid(rest, backbones, own, alphas, folds_of(images, folds), asked["seed"], configs, images, prefer, select)


def one_of(key: str, asked: Asked, known: tuple[str, ...]) -> str:
    """The value of a key of this command; the first of `known` if the command does not set it."""
    value = ",".join(asked.get(key, known[:1]))
    require(value in known, f"{key} must be one of {', '.join(known)}, got {value}.")
    return value


def number_in(folds: list[str]) -> int:
    """The number of folds in the words that set it."""
    require(
        len(folds) == 1 and folds[0].isdecimal() and int(folds[0]) > 1,
        f"split.folds must be one number, 2 or more, got {','.join(folds)}.",
    )
    return int(folds[0])


# --- The plan for a budget ---


def levels_for(limits: dict[str, str], words: list[str], asked: Asked) -> list[budget.Level]:
    """The levels that a budget or a preset chooses among, with the values that the command sets itself."""
    keys = {word.partition("=")[0].lstrip("+") for word in words}
    require(len(limits) == 1, "budget= and preset= both say how much is compared: name one of them.")
    require(
        not any(key.startswith("hydra/launcher") for key in keys),
        "budget= and preset= plan runs one after the other: leave out hydra/launcher.",
    )
    fixed: dict[str, Any] = {"iterations": None} if keys & (STEPS | BATCHES) else {}
    fixed |= {"own_length": True} if keys & STEPS and not keys & BATCHES else {}
    fixed |= {"image_size": None} if keys & SIZE else {}
    fixed |= {"backbones": tuple(asked["backbone"])} if "backbone" in asked else {}
    fixed |= {"methods": ("l2", *(one for one in asked["reg"] if one != "l2"))} if "reg" in asked else {}
    fixed |= {"seeds": len(asked["seed"])} if "seed" in asked else {}
    fixed |= {"folds": number_in(asked["split.folds"])} if "split.folds" in asked else {}
    if "preset" not in limits:
        budget.seconds_in(limits["budget"])
        return budget.levels_with(fixed)
    name = limits["preset"]
    require(name in budget.PRESETS, f"preset must be one of {', '.join(budget.PRESETS)}, got {name}.")
    return budget.levels_with(fixed, [budget.LEVELS[budget.PRESETS[name]]])


def plan_of(grid: Grid, levels: list[budget.Level], limits: dict[str, str], began: float) -> budget.Chosen:
    """Measures levels from the cheapest on, and takes the dearest that ends in time, or that of the preset."""
    first = grid.configs[next(iter(grid.backbones)), "l2"]
    dataset, images = load_dataset(first.dataset, Path(first.cache_dir)), sum(grid.images.values())
    beside = {one: seconds_beside_steps(grid.configs[one, "l2"]) for one in grid.backbones}
    strengths = {method: len(values) for method, values in grid.alphas.items()}
    measured = Plan()

    def estimate_of(level: budget.Level) -> budget.Estimate:
        configs = {}
        for backbone in level.backbones:
            values = budget.settings(level, grid.configs[backbone, "l2"], images)
            for method in level.methods:
                configs[backbone, method] = budget.with_settings(grid.configs[backbone, method], values)
        return budget.estimate(level, dataset, configs, strengths, beside, measured)

    def seconds_left() -> float:
        return budget.seconds_in(limits["budget"]) - (time.monotonic() - began)

    most = number_of_folds(grid.images, max(level.folds for level in levels))
    levels = budget.levels_with({}, [replace(level, folds=min(level.folds, most)) for level in levels])
    if "preset" in limits:
        level, found, more = levels[0], estimate_of(levels[0]), "budget=TIME compares as much as fits into a time."
    else:
        level, found, more = budget.dearest_within(levels, seconds_left, estimate_of)
    found = replace(found, before=found.before + time.monotonic() - began)
    return budget.Chosen(level, found, images, more)


def against_estimate(estimate: budget.Estimate, result: Result, seconds: float) -> list[str]:
    """Compares the command's time with its estimate."""
    if result.choice is None:
        return []
    estimated = estimate.of(*result.choice)
    if any(state != "done" for state, _ in result.made):
        return [f"Estimated: {duration(estimated)} for all runs. Some were finished before, so the time is no test."]
    off = 100 * (seconds / estimated - 1)
    return [f"Estimated: {duration(estimated)}. It took {duration(seconds)} ({off:+.0f} %)."]


# --- The comparison ---


def choose_and_train(grid: Grid, sweep: Sweep) -> Result:
    """Chooses on folds, and trains the choice on all training images. sweep: carries a command out."""
    config = next(iter(grid.configs.values()))
    validated = [
        made for one in grid.backbones for method in grid.methods for made in sweep(grid.on_folds(one, method))
    ]
    runs_dir = Path(config.results_dir) / "runs"
    ended = [record | {"folder": runs_dir / record["run_id"]} for _, record in validated if record]
    on_held_out = f"val_{grid.select}"
    records = [record for record in ended if problem(record, on_held_out) is None]
    failed = [record for record in ended if record.get("error")]
    if config.dry_run and any(state in ("missing", "interrupted") for state, _ in validated):
        backbone, dearest = list(grid.backbones)[-1], max(grid.methods, key=method_order)
        for method in grid.in_final(dearest):
            sweep(grid.final(backbone, method))
        attention = any(has(one.reg, ATTENTION) for one in grid.configs.values())
        stands = METHODS[dearest].title + (f" on {backbone}" if len(grid.backbones) > 1 else "")
        return Result(
            [
                f"First {len(validated)} runs on {grid.folds} folds of the training images choose a method and alpha. "
                f"Then what was chosen, for which {stands} stands here, is trained on all of them with "
                f"{len(grid.seeds)} seeds, beside L2 and L2-FE where they are compared.",
                *without_a_gpu(config, attention),
            ]
        )
    if elsewhere := sum(state == "in progress" for state, _ in validated):
        return Result(
            [f"{elsewhere} runs are in progress elsewhere: repeat the command after them to choose among all."]
        )
    if not any(method_of(record) == "l2" for record in records):
        raise UserError("There is nothing to choose from: the runs of L2, the baseline, failed.")

    validation = compare(records, on_held_out)
    selection = choose(validation, failed)
    sys.stdout.write(tables.on_screen([sections.accuracies(validation)], sys.stdout.isatty()))
    for line in (*selection.warnings, *selection.undecided, *map(str, selection.choices)):
        log.info(line)
    if without := [METHODS[method].title for method in grid.methods if method not in validation.methods]:
        log.info(f"not compared: {', '.join(without)}: every run failed")
    candidates = on_all_folds(selection.choices, grid.folds)
    best = best_of(candidates)
    rivals = rivals_of(best, candidates, on_held_out)
    for line in in_words(best, rivals):
        log.info(line)
    chosen = best if grid.prefer == "best" else simplest(best, rivals)
    run = chosen.best.cell.runs[0]
    backbone, method = grid.backbone_of(run), method_of(run)
    final = [
        made
        for one in grid.in_final(method)
        for made in sweep(grid.final(backbone, one, alpha_of(chosen) if one == method else None))
    ]
    if config.dry_run:
        return Result([f"On folds {named(chosen)} was chosen: the final runs train it and L2."])
    made = [record | {"folder": runs_dir / record["run_id"]} for _, record in final if record]
    finished = [record for record in made if problem(record, f"test_{grid.select}") is None]
    if missing := len(final) - len(finished):
        return Result([f"{missing} of {len(final)} final runs are not there: no verdict without them."])
    lines = conclusion(chosen, best, records + failed, finished, grid.select)
    return Result(lines, (backbone, method), validated + final)


def asked_and_rest(words: list[str]) -> tuple[Asked, list[tuple[str, str]], list[str]]:
    """The compared values, the options of methods (key and word), and the words that all runs share.

    Raises UserError if another key has several values.
    """
    parser = OverridesParser.create()
    asked, of_methods, rest = {}, [], []
    for word in words:
        override = None if word.startswith("-") else parser.parse_override(word)
        require(
            override is None or override.package is None,
            f"{word}: +experiment=which_is_best compares single methods, and no sums.",
        )
        if override and override.key_or_group in (*COMPARED, *OF_WHICH_IS_BEST):
            asked[override.key_or_group] = values_of(override)
        elif word not in ("-m", "--multirun"):
            require(
                override is None or not override.is_sweep_override(),
                f"{word}: +experiment=which_is_best compares methods and backbones only: name one value.",
            )
            if override and override.key_or_group.startswith("reg."):
                of_methods.append((override.key_or_group, word))
            else:
                rest.append(word)
    return asked, of_methods, rest


def has(options: object, key: str) -> bool:
    """Whether a method with these options has the key, such as reg.attention.method."""
    for name in key.split(".")[1:]:
        found = options if isinstance(options, dict) else vars(options) if hasattr(options, "__dict__") else {}
        if name not in found:
            return False
        options = found[name]
    return True

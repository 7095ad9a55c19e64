"""delta-run +experiment=which_is_best dataset.root=photos: which method is best on these images, and by how much.

It makes several sweeps in one command. The first ones run every backbone, method and alpha on folds of the training
images. It chooses the simplest that is as good as the best on the held-out images (prefer=simple), or the best
(prefer=best). The last ones train the choice, L2 (the baseline) and L2-FE on all training images with several seeds.
Test images measure the choice and do not change it. Finished runs are skipped, as in any sweep. budget=45m or
preset=good decides what is compared, and how thoroughly (experiment/budget.py).

A data set with a validation split of its own, such as molecules, needs no folds. The first sweeps have all seeds, and
validation data alone choose. The last sweeps then find their runs finished: nothing is trained twice. The task says by
which measures it can be chosen (select=).
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common import tables
from ..common.console import duration, log
from ..common.errors import UserError
from ..common.options import describe, require
from ..common.style import method_order
from ..common.tables import Table
from ..data import load_once
from ..experiment import budget
from ..experiment.choosing import (
    Made,
    alpha_of,
    best_of,
    complete,
    conclusion,
    named,
    number_of_folds,
    without_a_gpu,
)
from ..experiment.costs import seconds_beside_steps
from ..experiment.lookup import Lookup
from ..experiment.planning import Plan
from ..methods import METHODS
from ..records.reading import method_of
from ..reporting import sections
from ..reporting.comparison import compare
from ..reporting.record_views import problem
from ..reporting.rivals import in_words, rivals_of, simplest
from ..reporting.selection import choose
from .grid import Asked, Compose, Grid, asked_and_rest, first_words, grid_of, has, number_in

LIMITS = ("budget", "preset")
STEPS, BATCHES = {"schedule.iterations", "schedule.epochs"}, {"schedule", "schedule.batch_size"}
SIZE = {"backbone.image_size", "backbone.resize"}
ATTENTION = "reg.attention.method"

Sweep = Callable[[list[str]], list[Made]]


@dataclass(frozen=True)
class Result:
    lines: list[str | Table]  # sentences and tables
    choice: budget.Place | None = None
    made: list[Made] = field(default_factory=list)


def compare_methods(words: list[str], compose_first_job: Compose, sweep: Sweep, lookup: Lookup) -> list[str | Table]:
    """Makes the comparison that a command's `words` ask for; returns its result in sentences and tables.

    compose_first_job: composes the first job of a command and returns the parameters of its sweep, too.
    sweep: carries a command out, or plans it. lookup: that of its plan, which reads and measures nothing twice.
    """
    began = time.monotonic()
    asked, of_methods, rest = asked_and_rest(words)
    limits = {key: ",".join(asked.pop(key)) for key in LIMITS if key in asked}
    if not limits:
        return choose_and_train(grid_of(asked, of_methods, rest, compose_first_job, lookup.datasets), sweep).lines
    config, _ = compose_first_job(first_words(asked, rest))
    require(
        config.backbone.inputs == "images" and not config.dataset.own_validation,
        f"budget= and preset= plan folds of images, which {config.dataset.name} does not have: leave them out, and "
        "name fewer methods (reg=), alphas (reg.alpha=), seeds (seed=) or epochs (schedule.epochs=) for less time.",
    )
    levels = levels_for(limits, words, asked)
    # Everything that a level may compare is composed now, so that misspelt words are found.
    asked |= {"backbone": several(level.backbones for level in levels), "reg": several(one.methods for one in levels)}
    options = [each.name for one in asked["reg"] if one in METHODS for each in describe(METHODS[one].options)]
    if ATTENTION.removeprefix("reg.") in options and ATTENTION not in dict(of_methods):
        of_methods = [*of_methods, (ATTENTION, f"{ATTENTION}=taylor")]
    grid = grid_of(asked, of_methods, rest, compose_first_job, lookup.datasets)
    config = grid.configs[next(iter(grid.backbones)), "l2"]
    path = budget.plan_path(config.results_dir, words)
    plan = budget.read_plan(path)
    if plan:
        log.info(f"The plan of this command's first start is in {path}. Delete it, and the command plans anew.")
    else:
        plan = plan_of(grid, levels, limits, began, Plan(lookup=lookup))
        if not config.dry_run:
            budget.write_plan(path, plan)
    grid = grid.planned(plan)
    said = [
        f"Planned: {plan.level}. It takes about {duration(plan.estimate.total)}: this measurement, decoding, "
        "and all of each run, one after the other.",
        plan.more,
    ]
    if config.dry_run:
        counted = choose_and_train(grid, sweep).lines[:1]  # without its hint to name a budget
        return [*said, *counted, "The command without dry_run=true measures anew, and keeps its plan."]
    for line in said:
        log.info(line)
    result = choose_and_train(grid, sweep)
    return [*result.lines, *against_estimate(plan.estimate, result, time.monotonic() - began)]


def several(groups: Any) -> list[str]:
    return list(dict.fromkeys(one for group in groups for one in group))


# --- What is compared ---


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


def plan_of(
    grid: Grid, levels: list[budget.Level], limits: dict[str, str], began: float, measured: Plan
) -> budget.Chosen:
    """Measures levels from the cheapest on, and takes the dearest that ends in time, or that of the preset."""
    first = grid.configs[next(iter(grid.backbones)), "l2"]
    dataset = load_once(first.dataset, Path(first.cache_dir), measured.lookup.datasets)
    images = sum(grid.images.values())
    beside = {one: seconds_beside_steps(grid.configs[one, "l2"]) for one in grid.backbones}
    strengths = {method: len(values) for method, values in grid.alphas.items()}

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
    """Chooses on validation data, and trains the choice on all training images. sweep: carries a command out."""
    config = next(iter(grid.configs.values()))
    validated = [made for one in grid.backbones for method in grid.methods for made in sweep(grid.first(one, method))]
    runs_dir = Path(config.results_dir) / "runs"
    ended = [record | {"folder": runs_dir / record["run_id"]} for _, record in validated if record]
    on_held_out = f"val_{grid.select}"
    records = [record for record in ended if problem(record, on_held_out) is None]
    failed = [record for record in ended if record.get("error")]
    if config.dry_run and any(state in ("missing", "interrupted") for state, _ in validated):
        plan = (
            f"{len(validated)} runs are every method and alpha with {len(grid.seeds)} seeds, and the validation "
            f"{grid.inputs} choose among them. The runs of the choice and of L2 are the final ones, too: nothing is "
            "trained twice."
        )
        if grid.folds:
            backbone, dearest = list(grid.backbones)[-1], max(grid.methods, key=method_order)
            for method in grid.in_final(dearest):
                sweep(grid.final(backbone, method))
            stands = METHODS[dearest].title + (f" on {backbone}" if len(grid.backbones) > 1 else "")
            plan = (
                f"First {len(validated)} runs on {grid.folds} folds of the training {grid.inputs} choose a method and "
                f"alpha. Then the choice is trained on all of them with {len(grid.seeds)} "
                f"seed{'s' * (len(grid.seeds) != 1)}, beside L2 and L2-FE where they are compared. The plan counts it "
                f"as {stands}, which takes longest."
            )
        attention = any(has(one.reg, ATTENTION) for one in grid.configs.values())
        return Result([plan, *without_a_gpu(config, attention)])
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
    candidates = complete(selection.choices, *grid.of_each)
    best = best_of(candidates)
    rivals = rivals_of(best, candidates, on_held_out)
    for line in in_words(best, rivals):
        log.info(line)
    chosen = best if grid.prefer == "best" else simplest(best, rivals)
    run = chosen.best.cell.runs[0]
    backbone, method = grid.backbone_of(run), method_of(run)
    to_make = grid.in_final(method) if grid.folds or not config.dry_run else []  # else the plan has them already
    final = [
        made
        for one in to_make
        for made in sweep(grid.final(backbone, one, alpha_of(chosen) if one == method else None))
    ]
    if config.dry_run:
        on = "folds" if grid.folds else f"validation {grid.inputs}"
        return Result([f"On {on} {named(chosen)} was chosen: the final runs are those of it and of L2."])
    made = [record | {"folder": runs_dir / record["run_id"]} for _, record in final if record]
    finished = [record for record in made if problem(record, f"test_{grid.select}") is None]
    if missing := len(final) - len(finished):
        no_verdict = f"{missing} of {len(final)} final runs are not there: no verdict without them."
        require(all(state != "failed" for state, _ in final), no_verdict)
        return Result([no_verdict])
    lines = conclusion(chosen, best, records + failed, finished, grid.select)
    return Result(lines, (backbone, method), validated + final)

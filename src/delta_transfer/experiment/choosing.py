"""Which method is best: the choice on held-out images, and the verdict on test images.

What holds for images here holds for the inputs of other tasks, too. cli/which_is_best.py makes the runs.
"""

import math
from pathlib import Path

from ..common.console import log_once, quoted
from ..common.errors import UserError
from ..common.options import require
from ..common.style import method_order
from ..common.tables import Table
from ..data import load_once
from ..data.dataset import Dataset, make_splits
from ..engine.config import RunConfig
from ..engine.devices import pick_device
from ..engine.tasks import TASKS, Classification
from ..records import arrays
from ..records.metrics import METRICS
from ..records.reading import Record, config_of, folds, method_of, method_title, section
from ..reporting.comparison import Cell, cell_of, compare
from ..reporting.leaderboard import leaderboards
from ..reporting.rivals import files_of, network_of
from ..reporting.selection import Choice
from ..reporting.statistics import Difference, by_image, paired
from ..reporting.trust import trusted
from ..reporting.trust_tables import by_class, confusions, summary, suspicious

SHOWN = 5  # lines of a table of classes or images
Made = tuple[str, Record | None]  # how a job ended, and its record if there is one


def ruled_out(failed: Record | None) -> bool:
    """Whether a failed run is a result: a setting that diverges is not the best. failed: the run's record.

    Final runs after folds hold nothing out.
    """
    return failed is not None and failed.get("failure") == "diverged" and bool(folds(failed) or failed.get("n_val"))


def without_a_gpu(config: RunConfig, attention: bool) -> list[str]:
    """Hints that make the comparison shorter on a CPU. attention: whether a method measures channel attention."""
    faster = "backbone=resnet18 backbone.image_size=128 backbone.resize=146"
    faster += " reg.attention.method=taylor" if attention else ""
    if pick_device(config.device).type != "cpu" or config.backbone.image_size <= 128:
        return []
    return [
        "This is a CPU. budget=45m compares as much as ends in that time. Or take smaller images and a smaller "
        f"network: {faster}"
    ]


# ---- folds -----------------------------------------------------------------------------------------------


def training_images(config: RunConfig, datasets: dict[str, Dataset]) -> dict[str, int]:
    """The number of training images of each class, for a data set without a validation split of its own."""
    dataset = load_once(config.dataset, Path(config.cache_dir), datasets)
    train = make_splits(dataset, config.dataset, config.split, config.seed).train
    return {name: int((dataset.labels[train] == label).sum()) for label, name in enumerate(dataset.classes)}


def folds_of(images: dict[str, int], wanted: int) -> int:
    folds = number_of_folds(images, wanted)
    smallest = min(images, key=lambda name: images[name])
    if folds < wanted:
        log_once(f"Class {smallest} has {images[smallest]} training examples: {folds} folds instead of {wanted}")
    return folds


def number_of_folds(images: dict[str, int], wanted: int) -> int:
    """The number of folds: at most `wanted`, and so few that each fold holds out an image of every class."""
    smallest = min(images, key=lambda name: images[name])
    require(
        images[smallest] > 1,
        f"Class {smallest} has a single training example: none can be held out to choose a method. Add some, or train "
        "without a choice: reg=l2 instead of +experiment=which_is_best.",
    )
    return min(wanted, images[smallest])


# ---- the choice ------------------------------------------------------------------------------------------


def complete(choices: list[Choice], count: int, what: str) -> list[Choice]:
    """The choices with a result on each of `count` folds or seeds, since a missing fold may be the hardest one.

    what: folds or seeds.
    """
    found = [choice for choice in choices if choice.best.cell.n == count]
    if not found:
        raise UserError(f"There is nothing to choose from: no method has a result on each of the {count} {what}.")
    return found


def best_of(choices: list[Choice]) -> Choice:
    """The choice with the best mean on validation. Ties go to the lower loss, then to the first column."""

    def order(choice: Choice) -> tuple[float, float, tuple[int, str]]:
        cell = choice.best.cell
        loss = math.inf if cell.val_loss is None else cell.val_loss
        return -round(cell.merit, 9), loss, method_order(method_of(cell.runs[0]))

    return min(choices, key=order)


def alpha_of(choice: Choice) -> float | None:
    return section(choice.best.cell.runs[0], "reg").get("alpha")


def named(choice: Choice) -> str:
    alpha = alpha_of(choice)
    return method_title(choice.best.cell.runs[0]) + ("" if alpha is None else f" (reg.alpha={alpha:g})")


# ---- the verdict -----------------------------------------------------------------------------------------


def task_of(record: Record) -> Classification:
    return TASKS[config_of(record).get("task", "classification")]


def held_out(record: Record) -> str:
    """What a run's validation data are, in words."""
    inputs = task_of(record).inputs
    return f"{inputs} held out of training" if folds(record) else f"validation {inputs}"


def conclusion(
    chosen: Choice, best: Choice, validated: list[Record], final: list[Record], select: str
) -> list[str | Table]:
    """The leaderboard of the final runs, whether the model can be trusted, the verdict, and what comes next."""
    made = result_tables(chosen, final, select)
    return [*made, *verdict(chosen, best, validated, final, select), *next_commands(chosen, final, select)]


def verdict(
    chosen: Choice, best: Choice, validated: list[Record], final: list[Record], select: str = "top1"
) -> list[str]:
    """Sentences that say what was chosen, how it differs from L2, and whether that is noise.

    best: the choice with the best mean on held-out images. validated: the records that `chosen` was chosen among,
    failed ones included. final: the records of it and of L2 on all training images, each with its `folder`. select:
    one of the task's measures.
    """
    method, name = method_of(chosen.best.cell.runs[0]), named(chosen)
    cells = final_cells(chosen, final, select)
    several = len({section(run, "backbone")["name"] for run in validated}) > 1
    ours, first = (named(one) + (f" on {network_of(one)}" if several else "") for one in (chosen, best))
    task, kind = task_of(final[0]), METRICS[f"val_{select}"]
    measure = kind.title[:1].lower() + kind.title[1:]
    on = held_out(chosen.best.cell.runs[0])
    lines = [f"Chosen on {on}: {ours}, {kind.shown(chosen.best.cell.mean)} {measure}."]
    if chosen is not best:
        lines[0] += (
            f" {first} has {kind.shown(best.best.cell.mean)}, and {ours} is the simplest within one standard error of "
            "that (prefer=best takes the best mean)."
        )
    if method == "l2":
        others = {method_of(run) for run in validated} - {"l2"}
        better = "no other method did better on them" if chosen is best else "no other was clearly better on them"
        than = better if others else "no other was tried"
        lines.append(f"That is plain fine-tuning: {than}. It has {of(cells['l2'])} on the test {task.inputs}.")
    else:
        over = over_images(cells[method], cells["l2"], select)
        lines.append(result(name, cells[method], cells["l2"], over, task.inputs))
    beside = [method_title(cell.runs[0]) + f" has {of(cell)}" for k, cell in cells.items() if k not in ("l2", method)]
    lines += [f"For comparison: {', '.join(beside)} on the test {task.inputs}."] if beside else []
    lines += at_the_edge(chosen, validated)
    n_test = final[0].get("n_test")
    if isinstance(n_test, int) and 0 < n_test < 1000:
        worth = f"so that each is worth {100 / n_test:.1f} points"
        worth = worth if task.one_label else "and no interval here covers the chance of drawing others"
        lines.append(f"There are {n_test} test {task.inputs}, {worth}.")
    return lines


def final_cells(chosen: Choice, final: list[Record], select: str) -> dict[str, Cell]:
    """The final runs of each method. L2 and the chosen method come first."""
    methods = dict.fromkeys(["l2", method_of(chosen.best.cell.runs[0]), *map(method_of, final)])
    return {m: cell_of([run for run in final if method_of(run) == m], f"test_{select}", []) for m in methods}


def model_of(cell: Cell) -> Record:
    """The run of the first seed."""
    return min(cell.runs, key=lambda run: run["seed"])


def result_tables(chosen: Choice, final: list[Record], select: str) -> list[Table]:
    """The leaderboard of the final runs, and whether the chosen model can be trusted."""
    made = leaderboards(compare(final, f"test_{select}"), "l2")
    model = model_of(final_cells(chosen, final, select)[method_of(chosen.best.cell.runs[0])])
    on_folds = [run for run in chosen.best.cell.runs if folds(run)]  # they tell what was held out
    for one in trusted([model, *on_folds], lambda _: None):
        found = [summary([one]), by_class(one, SHOWN), confusions(one, SHOWN), suspicious(one, SHOWN)]
        made += [table for table in found if table]
    return made


def next_commands(chosen: Choice, final: list[Record], select: str) -> list[str]:
    """Where the models are, and the commands that go on with them."""
    run, task = chosen.best.cell.runs[0], task_of(final[0])
    cells, method = final_cells(chosen, final, select), method_of(run)
    model, l2 = (quoted(str(model_of(cells[one])["folder"])) for one in (method, "l2"))
    lines = [f"The model: {model} (trained with the first seed; test {task.inputs} took no part in the choice)"]
    lines += [f"The model of L2: {l2}"] if method != "l2" else []
    if files := files_of(chosen.best.cell.runs):
        lines.append(f"What {method_title(run)} predicted for {held_out(run)}: {' '.join(map(quoted, files))}")
    both = model if method == "l2" else f"{model} {l2}"
    return [*lines, *(f"Next: {command.format(run=model, runs=both)}" for command in task.commands)]


def over_images(ours: Cell, l2: Cell, select: str) -> Difference | None:
    """The interval of the difference over resampled test images; None if predictions are missing."""
    pairs = []
    for key, run in zip(ours.values, ours.runs, strict=True):
        if key in l2.values:
            both = arrays.predictions(run), arrays.predictions(l2.runs[list(l2.values).index(key)])
            if both[0] is None or both[1] is None:
                return None
            pairs.append((both[0], both[1]))
    return by_image(pairs, select != "top1") if pairs else None


def result(name: str, ours: Cell, l2: Cell, images: Difference | None, inputs: str) -> str:
    """Whether `ours` won: it is ahead by more than the chance of seeds and of the drawn test images.

    inputs: their name.
    """
    difference, points = paired(ours, l2), " points" * ours.kind.percent
    has = f"has {of(ours)} on the test {inputs}, and L2 (plain fine-tuning) has {of(l2)}"
    open_result = f"No winner: {name} {has}."
    if difference is None or difference.n == 1:
        return f"One seed cannot tell which is better: {name} {has}. Add seed='range(3)'."
    mean = difference.signed(difference.mean) + points
    if difference.low is None:
        return (
            f"{open_result} Each of the {difference.n} seeds gives a difference of {mean}, so that there is no "
            "interval."
        )
    interval = f"{mean}, {difference.certainty}, paired"
    if not difference.excludes_zero:
        if difference.advice:
            return f"{open_result} The difference is {mean}. {difference.advice}"
        return f"{open_result} The difference ({interval}) cannot be told from noise."
    if images and not images.excludes_zero:
        drawn = (
            f"95 % interval {images.low:+.1f} to {images.high:+.1f} over {images.n} test {inputs}"
            if images.low is not None
            else f"the two differ in too few of {images.n} test {inputs} for an interval"
        )
        return (
            f"{open_result} The difference ({interval}) is more than the chance of seeds, but with so few test "
            f"{inputs} it cannot be told from noise ({drawn})."
        )
    if images:
        interval += f"; {images.low:+.1f} to {images.high:+.1f} over {images.n} test {inputs}"
    if difference.merit > 0:
        return f"{name} won: it {has}. The difference ({interval}) is more than noise."
    return f"L2 won: {name} {has}. The difference ({interval}) is more than noise."


def of(cell: Cell) -> str:
    return cell.kind.shown(cell.mean) + ("" if cell.std is None else f" ± {cell.std:.{cell.kind.digits}f}")


def at_the_edge(chosen: Choice, validated: list[Record]) -> list[str]:
    """A hint if alpha is the smallest or largest of several that were tried: a value beyond it may do better."""
    method, alpha = method_of(chosen.best.cell.runs[0]), alpha_of(chosen)
    tried = {float(section(run, "reg")["alpha"]) for run in validated if method_of(run) == method and alpha is not None}
    if alpha is None or len(tried) < 2 or alpha not in (min(tried), max(tried)):
        return []
    end, beyond = ("smallest", alpha / 10) if alpha == min(tried) else ("largest", alpha * 10)
    return [
        f"reg.alpha={alpha:g} is the {end} that was tried, and one beyond it may do better: the same command with "
        f"reg={method} reg.alpha={','.join(f'{value:g}' for value in sorted([*tried, beyond]))} tries it, too."
    ]

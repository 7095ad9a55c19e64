"""delta-run +experiment=which_is_best dataset.root=photos: which method is best on these images, and by how much.

Two sweeps in one command. The first runs every method and alpha on folds of the training images; what did best on the
images held out is chosen, as delta-report --select cv does. The second trains that and L2, the baseline, on all
training images with several seeds, and only they see the test part: it says how good the choice is, and changes nothing
about it. Finished runs are skipped, as in any sweep.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from ..common import tables
from ..common.console import log
from ..common.errors import UserError
from ..common.options import require
from ..config import RunConfig
from ..records import reading as runs
from ..reporting import sections
from ..reporting.comparison import Cell, cell_of, compare, display, is_number, method_of, method_order, problem, section
from ..reporting.selection import Choice, choose
from ..reporting.statistics import Difference, by_image, paired

# From the published values, of thousands of images, down to those that are best for hundreds in results/published.
ALPHAS = {
    "l2_sp": ["0.01", "0.1"],
    "delta_noatt": ["0.0001", "0.001", "0.01"],
    "delta": ["0.0001", "0.001", "0.01"],
}
ONLY_SHOWN = re.compile(r"-h|--help|--hydra-help|--version|-c|--cfg(=.*)?|-i|--info(=.*)?|-sc|--shell-completion")
Made = tuple[str, dict | None]  # how a job ended (Outcome.state, Job.state), and its record where there is one


def asked_for(words: list[str]) -> bool:
    return "+experiment=which_is_best" in words and not any(map(ONLY_SHOWN.fullmatch, words))


def carry_out(
    words: list[str],
    look: Callable[[list[str]], tuple[RunConfig, dict[str, str]]],
    sweep: Callable[[list[str]], list[Made]],
) -> list[str]:
    """What came of the comparison that a command's `words` ask for, in sentences.

    `look` composes the first job of a command and names the parameters of its sweep; `sweep` carries a command out.
    """
    asked, of_methods, rest = asked_and_rest(words)
    config, usual = look([*rest, "reg=l2"])
    asked = asked_and_rest([f"{key}={values}" for key, values in usual.items()])[0] | asked
    wanted = asked["split.folds"]
    require(
        len(wanted) == 1 and wanted[0].isdecimal() and int(wanted[0]) > 1,
        f"split.folds must be one number, 2 or more, got {','.join(wanted)}.",
    )
    methods = ["l2", *(method for method in asked["reg"] if method != "l2")]  # the baseline is always there
    # Every method, with all that it is to be run with, is looked at before any is run: what is misspelt is found now.
    options = {method: look([*rest, f"reg={method}"])[0].reg for method in methods}
    own = {method: [w for key, w in of_methods if has(options[method], key)] for method in methods}
    alphas = ALPHAS
    if "reg.alpha" in asked:
        of_methods = [*of_methods, ("reg.alpha", f"reg.alpha={','.join(asked['reg.alpha'])}")]
        alphas = dict.fromkeys([m for m in methods if has(options[m], "reg.alpha")], asked["reg.alpha"])
    for key, word in of_methods:
        require(any(has(reg, key) for reg in options.values()), f"{word}: none of {', '.join(methods)} has it.")
    for method in methods:
        for alpha in alphas.get(method, [None]):
            strength = [] if alpha is None else [f"reg.alpha={alpha}"]
            look([*rest, f"reg={method}", *own[method], *strength])
    folds, seeds = folds_of(config, int(asked["split.folds"][0])), asked["seed"]

    validated: list[Made] = []
    for method in methods:
        strength = [f"reg.alpha={','.join(alphas[method])}"] if method in alphas else []
        held_out = [f"split.folds={folds}", f"split.fold={','.join(map(str, range(folds)))}"]
        validated += sweep([*rest, f"reg={method}", *own[method], *strength, f"seed={seeds[0]}", *held_out])
    records = [record for _, record in validated if record and problem(record, "val_top1") is None]
    failed = [record for _, record in validated if record and record.get("error")]
    on_all = [*rest, "split.folds=null", f"seed={','.join(seeds)}"]
    if config.dry_run and any(state in ("missing", "interrupted") for state, _ in validated):
        dearest = max(methods, key=method_order)
        sweep([*on_all, "reg=l2", *own["l2"]])
        if dearest != "l2":
            sweep([*on_all, f"reg={dearest}", *own[dearest]])
        return [
            f"First {len(validated)} runs on {folds} folds of the training images choose a method and alpha. Then L2 "
            f"and what was chosen, for which {display(dearest)} stands here, are trained on all of them with "
            f"{len(seeds)} seeds each.",
            *without_a_gpu(config, any(has(reg, "reg.attention.method") for reg in options.values())),
        ]
    if elsewhere := sum(state == "in work" for state, _ in validated):
        return [f"{elsewhere} runs are in work elsewhere: the same command, once they are done, chooses among all."]
    if not any(method_of(record) == "l2" for record in records):
        raise UserError("There is nothing to choose from: the runs of L2, the baseline, failed.")

    validation = compare(records, "val_top1")
    selection = choose(validation, failed)
    log.info(tables.on_screen([sections.accuracies(validation)], terminal=False))
    for line in (*selection.warnings, *selection.undecided, *map(str, selection.choices)):
        log.info(line)
    if without := [display(method) for method in methods if method not in validation.methods]:
        log.info(f"not compared: {', '.join(without)}: every run failed")
    chosen = best_of(on_all_folds(selection.choices, folds))
    method = method_of(chosen.best.cell.runs[0])
    alpha = [f"reg.alpha={alpha_of(chosen)}"] if method in alphas else []
    final = sweep([*on_all, "reg=l2", *own["l2"]])
    if method != "l2":
        final += sweep([*on_all, f"reg={method}", *own[method], *alpha])
    if config.dry_run:
        return [f"On folds {named(chosen)} did best: it is what the final runs train beside L2."]
    runs_dir = Path(config.results_dir) / "runs"
    finished = [
        record | {"folder": runs_dir / record["run_id"]} for _, record in final if record and problem(record) is None
    ]
    if len(finished) < len(final):
        return [f"{len(final) - len(finished)} of {len(final)} final runs are not there: no verdict without them."]
    return verdict(chosen, records + failed, finished)


def ruled_out(failed: dict | None) -> bool:
    """Whether a failed run is a result: what diverges on a fold is not what is best. `failed`: its record."""
    return bool(failed) and failed.get("failure") == "diverged" and section(failed, "split").get("folds") is not None


def asked_and_rest(words: list[str]) -> tuple[dict[str, list[str]], list[tuple[str, str]], list[str]]:
    """Of `words`: the values of what is compared, options of methods (key and word), and what all runs share.

    Raises UserError if another key has several values.
    """
    parser = OverridesParser.create()
    asked, of_methods, rest = {}, [], []
    for word in words:
        override = None if word.startswith("-") else parser.parse_override(word)
        require(
            override is None or override.package is None,
            f"{word}: +experiment=which_is_best compares methods as they are, no sums of them.",
        )
        if override and override.key_or_group in ("reg", "reg.alpha", "seed", "split.folds"):
            asked[override.key_or_group] = values_of(override)
        elif word not in ("-m", "--multirun"):
            require(
                override is None or not override.is_sweep_override(),
                f"{word}: +experiment=which_is_best compares methods only: name one value.",
            )
            if override and override.key_or_group.startswith("reg."):
                of_methods.append((override.key_or_group, word))
            else:
                rest.append(word)
    return asked, of_methods, rest


def has(options: object, key: str) -> bool:
    """Whether a method with these `options` has the key, as reg.attention.method."""
    for name in key.split(".")[1:]:
        found = options if isinstance(options, dict) else vars(options) if hasattr(options, "__dict__") else {}
        if name not in found:
            return False
        options = found[name]
    return True


def without_a_gpu(config: RunConfig, attention: bool) -> list[str]:
    """What makes it an evening's work on a CPU; `attention`: whether a method measures it."""
    from ..engine.devices import pick_device

    faster = "backbone=resnet18 backbone.image_size=128 backbone.resize=146"
    faster += " reg.attention.method=taylor" if attention else ""
    if pick_device(config.device).type != "cpu" or config.backbone.image_size <= 128:
        return []
    return [f"This is a CPU. Where that takes too long, smaller images and a smaller network: {faster}"]


def values_of(override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


# ---- folds -----------------------------------------------------------------------------------------------


def folds_of(config: RunConfig, wanted: int) -> int:
    from ..data import load_dataset
    from ..data.dataset import make_splits

    dataset = load_dataset(config.dataset, Path(config.cache_dir))
    train = make_splits(dataset, config.dataset, config.split).train
    images = {name: int((dataset.labels[train] == label).sum()) for label, name in enumerate(dataset.classes)}
    folds = number_of_folds(images, wanted)
    smallest = min(images, key=images.get)
    if folds < wanted:
        log.info(f"Class {smallest} has {images[smallest]} training images: {folds} folds instead of {wanted}")
    return folds


def number_of_folds(images: dict[str, int], wanted: int) -> int:
    """As many as the class with the fewest training `images` allows: each holds out one of it at least."""
    smallest = min(images, key=images.get)
    require(
        images[smallest] > 1,
        f"Class {smallest} has a single training image: none can be held out to choose a method on. Add some, or train "
        "without a choice: reg=l2 instead of +experiment=which_is_best.",
    )
    return min(wanted, images[smallest])


# ---- the choice ------------------------------------------------------------------------------------------


def on_all_folds(choices: list[Choice], folds: int) -> list[Choice]:
    """Those that were tried on every fold: the one that another lacks may be the hard one."""
    complete = [choice for choice in choices if choice.best.cell.n == folds]
    if not complete:
        raise UserError(f"There is nothing to choose from: no method has a result on each of the {folds} folds.")
    return complete


def best_of(choices: list[Choice]) -> Choice:
    """Highest mean accuracy on validation; of those, lowest loss; of those, the method that comes first (METHODS)."""

    def order(choice: Choice) -> tuple:
        cell = choice.best.cell
        loss = math.inf if cell.val_loss is None else cell.val_loss
        return -round(cell.mean, 9), loss, method_order(method_of(cell.runs[0]))

    return min(choices, key=order)


def alpha_of(choice: Choice) -> float | None:
    return section(choice.best.cell.runs[0], "reg").get("alpha")


def named(choice: Choice) -> str:
    alpha = alpha_of(choice)
    return display(method_of(choice.best.cell.runs[0])) + ("" if alpha is None else f" (reg.alpha={alpha:g})")


# ---- the verdict -----------------------------------------------------------------------------------------


def verdict(chosen: Choice, validated: list[dict], final: list[dict]) -> list[str]:
    """In plain words: what was chosen, how much better than L2 it is, whether that is more than noise, where it is.

    `validated`: the records that `chosen` was chosen among, failed ones too; `final`: those of it and of L2 on all
    training images, each with its `folder`.
    """
    method, name = method_of(chosen.best.cell.runs[0]), named(chosen)
    cells = {key: cell_of([run for run in final if method_of(run) == key], "test_top1", []) for key in ("l2", method)}
    lines = [f"Chosen on images held out of training: {name}, {chosen.best.cell.mean:.1f} % of them right."]
    if method == "l2":
        rivals = {method_of(run) for run in validated} - {"l2"}
        than = "no other method did better there" if rivals else "no other was tried"
        lines.append(f"That is plain fine-tuning: {than}. On the test images: {of(cells['l2'])}.")
    else:
        lines.append(result(name, cells[method], cells["l2"], over_images(cells[method], cells["l2"])))
    lines += at_the_edge(chosen, validated)
    n_test = final[0].get("n_test")
    if is_number(n_test) and 0 < n_test < 1000:
        lines.append(f"There are {n_test} test images: one of them is {100 / n_test:.1f} points.")
    folders = {key: min(cell.runs, key=lambda run: run["seed"])["folder"] for key, cell in cells.items()}
    lines.append(f"The model: {folders[method]} (its first seed; no test image took part in any choice)")
    if method != "l2":
        lines.append(f"That of L2: {folders['l2']}")
    lines.append(f"Use it: delta-predict {folders[method]} IMAGES, delta-export {folders[method]} --format onnx")
    return lines


def over_images(ours: Cell, l2: Cell) -> Difference | None:
    """What other test images might have given; None where not all predictions are there."""
    pairs = [
        (runs.predictions(run), runs.predictions(l2.runs[list(l2.values).index(key)]))
        for key, run in zip(ours.values, ours.runs, strict=True)
        if key in l2.values
    ]
    if not pairs or any(one is None for pair in pairs for one in pair):
        return None
    return by_image(pairs)


def result(name: str, ours: Cell, l2: Cell, images: Difference | None) -> str:
    """A win is ahead by more than the chance of seeds, and of the test images that happened to be drawn."""
    difference = paired(ours, l2)
    both = f"{of(ours)} against {of(l2)} of L2 on the test images"
    if difference is None or difference.n == 1:
        return f"One seed cannot tell {name} from L2: {both}. Add seed='range(3)'."
    seeds = f"{difference.n} seeds, paired"
    if difference.low is None:
        every = f"{difference.mean:+.1f} points with every one of {difference.n} seeds"
        return f"No winner: {both}, {every}, which has no interval."
    interval = f"{difference.mean:+.1f} points, 95 % interval {difference.low:+.1f} to {difference.high:+.1f}, {seeds}"
    if not difference.excludes_zero:
        return f"No winner: {both}. The difference ({interval}) cannot be told from noise."
    if images and not images.excludes_zero:
        drawn = (
            f"95 % interval {images.low:+.1f} to {images.high:+.1f} over {images.n} test images"
            if images.low is not None
            else f"hardly any of {images.n} test images are told apart"
        )
        return (
            f"No winner: {both}. The difference ({interval}) is more than the chance of seeds, but with so few test "
            f"images it cannot be told from noise ({drawn})."
        )
    if images:
        interval += f"; {images.low:+.1f} to {images.high:+.1f} over {images.n} test images"
    if difference.mean > 0:
        return f"{name} won: {both}. The difference ({interval}) is more than noise."
    return f"L2 won: {both}. {name} did best on validation, but is behind ({interval}), by more than noise."


def of(cell: Cell) -> str:
    return f"{cell.mean:.1f} %" + ("" if cell.std is None else f" ± {cell.std:.1f}")


def at_the_edge(chosen: Choice, validated: list[dict]) -> list[str]:
    """Words for an alpha that is the smallest or largest of several that were tried: one beyond it may do better."""
    method, alpha = method_of(chosen.best.cell.runs[0]), alpha_of(chosen)
    tried = {section(run, "reg").get("alpha") for run in validated if method_of(run) == method}
    if len(tried) < 2 or alpha not in (min(tried), max(tried)):
        return []
    end, beyond = ("smallest", alpha / 10) if alpha == min(tried) else ("largest", alpha * 10)
    return [
        f"reg.alpha={alpha:g} is the {end} that was tried, and one beyond it may do better: the same command with "
        f"reg={method} reg.alpha={','.join(f'{value:g}' for value in sorted([*tried, beyond]))} tries it, too."
    ]

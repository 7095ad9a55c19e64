"""delta-run +experiment=which_is_best dataset.root=photos: which method is best on these images, and by how much.

It makes several sweeps in one command. The first runs every method and alpha on folds of the training images; the one
that does best on the images held out is chosen, as delta-report --select cv does. The second trains that one and L2,
the baseline, on all training images with several seeds, and only they see the test images: these say how good the
choice is, and change nothing about it. Finished runs are skipped, as in any sweep.
"""

from collections.abc import Callable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from ..common import tables
from ..common.console import log
from ..common.errors import UserError
from ..common.options import require
from ..common.style import method_order
from ..engine.config import RunConfig
from ..experiment.choosing import Made, alpha_of, best_of, folds_of, named, on_all_folds, verdict, without_a_gpu
from ..methods import METHODS
from ..records.reading import method_of
from ..reporting import sections
from ..reporting.comparison import compare
from ..reporting.record_views import problem
from ..reporting.selection import choose

# From the published values, of thousands of images, down to those that are best for hundreds in results/published.
ALPHAS = {
    "l2_sp": ["0.01", "0.1"],
    "delta_noatt": ["0.0001", "0.001", "0.01"],
    "delta": ["0.0001", "0.001", "0.01"],
}


def compare_methods(
    words: list[str],
    compose_first_job: Callable[[list[str]], tuple[RunConfig, dict[str, str]]],
    sweep: Callable[[list[str]], list[Made]],
) -> list[str]:
    """Makes the comparison that a command's `words` ask for; returns its result in sentences.

    compose_first_job: composes the first job of a command and returns the parameters of its sweep, too.
    sweep: carries a command out.
    """
    asked, of_methods, rest = asked_and_rest(words)
    config, usual = compose_first_job([*rest, "reg=l2"])
    asked = asked_and_rest([f"{key}={values}" for key, values in usual.items()])[0] | asked
    wanted = asked["split.folds"]
    require(
        len(wanted) == 1 and wanted[0].isdecimal() and int(wanted[0]) > 1,
        f"split.folds must be one number, 2 or more, got {','.join(wanted)}.",
    )
    methods = ["l2", *(method for method in asked["reg"] if method != "l2")]  # the baseline is always there
    # Every method, with all that it is to be run with, is looked at before any is run: what is misspelt is found now.
    options = {method: compose_first_job([*rest, f"reg={method}"])[0].reg for method in methods}
    own = {method: [w for key, w in of_methods if has(options[method], key)] for method in methods}
    alphas = ALPHAS
    if "reg.alpha" in asked:
        of_methods = [*of_methods, ("reg.alpha", f"reg.alpha={','.join(asked['reg.alpha'])}")]
        alphas = dict.fromkeys([m for m in methods if has(options[m], "reg.alpha")], asked["reg.alpha"])
    for key, word in of_methods:
        require(any(has(reg, key) for reg in options.values()), f"{word}: none of {', '.join(methods)} has it.")
    for method in methods:
        for strength in [[f"reg.alpha={alpha}"] for alpha in alphas.get(method, [])] or [[]]:
            compose_first_job([*rest, f"reg={method}", *own[method], *strength])
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
            f"and what was chosen, for which {METHODS[dearest].title} stands here, are trained on all of them with "
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
    if without := [METHODS[method].title for method in methods if method not in validation.methods]:
        log.info(f"not compared: {', '.join(without)}: every run failed")
    chosen = best_of(on_all_folds(selection.choices, folds))
    method = method_of(chosen.best.cell.runs[0])
    strength = [f"reg.alpha={alpha_of(chosen)}"] if method in alphas else []
    final = sweep([*on_all, "reg=l2", *own["l2"]])
    if method != "l2":
        final += sweep([*on_all, f"reg={method}", *own[method], *strength])
    if config.dry_run:
        return [f"On folds {named(chosen)} did best: it is what the final runs train beside L2."]
    runs_dir = Path(config.results_dir) / "runs"
    finished = [
        record | {"folder": runs_dir / record["run_id"]} for _, record in final if record and problem(record) is None
    ]
    if len(finished) < len(final):
        return [f"{len(final) - len(finished)} of {len(final)} final runs are not there: no verdict without them."]
    return verdict(chosen, records + failed, finished)


def asked_and_rest(words: list[str]) -> tuple[dict[str, list[str]], list[tuple[str, str]], list[str]]:
    """The values of what is compared, options of methods (key and word), and the words that all runs share.

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
    """Whether a method with these options has the key, such as reg.attention.method."""
    for name in key.split(".")[1:]:
        found = options if isinstance(options, dict) else vars(options) if hasattr(options, "__dict__") else {}
        if name not in found:
            return False
        options = found[name]
    return True


def values_of(override: Override) -> list[str]:
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]

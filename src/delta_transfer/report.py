"""delta-report: records of finished runs -> tables, figures, a page.

    delta-report                                   # results/runs, in the terminal
    delta-report --layout matrix                   # as papers have it: data sets by methods
    delta-report --format markdown --output table.md
    delta-report --against paper                   # beside published numbers, with differences in the settings
    delta-report --margin 1                        # which methods are no worse than L2 by more than a point
    delta-report --per-image                       # differences over the same test images, from the stored predictions
    delta-report --figures figures                 # learning curves, accuracy against alpha, intervals: PNG and PDF
    delta-report --format html --output report.html
    delta-report --format html --output report.html --watch     # renewed whenever a run of a sweep has ended
    delta-report --metric val_top1                 # the best hyper-parameters on validation data
    delta-report --select cv                       # the same by cross-validation: runs with split.folds only
    delta-report --select cv --emit-overrides      # the commands of the final runs with the choice, for | sh
    delta-report trust RUN ...                     # classes, confusions, calibration, wrong labels, worst images
    delta-report case-study RUN_A RUN_B            # activation maps, and channels that came to life
    delta-report attention RUN ...                 # the channel weights of DELTA
    delta-report publish RUNS --to FOLDER          # the records of many runs in one folder, to commit

The tables have the mean ± sample standard deviation over seeds of finished runs, and differences to a baseline, paired
by seed. They go to stdout or --output; stderr names the runs that were left out, with the reason. trust, case-study,
attention and publish have their own options (--help).
"""

import argparse
import shlex
import signal
import sys
import time
from dataclasses import replace
from importlib import import_module

from .cli.report_options import NUMBERS, PAIRS, arguments
from .common import tables
from .common.console import QUIET, Display, log, shorten_list, show_messages, stoppable
from .common.errors import UserError
from .records.arrays import predictions
from .records.files import write_output
from .records.metrics import METRICS, OF_OTHER_TASKS
from .records.reading import Damaged, Record, finished_files, folds, is_number, read_all, run_id, transfers
from .reporting import export, sections
from .reporting.comparison import Comparison, compare, together
from .reporting.leaderboard import leaderboards
from .reporting.published import PROTOCOLS
from .reporting.record_views import contradiction, problem, validates
from .reporting.rivals import between_methods
from .reporting.selection import Selection, choose, command, refused
from .reporting.sweeps import label_curves

CLEAR = "\033[2J\033[H"  # the screen of a terminal
MOST_NAMED = 20  # runs that are not in the table, with a line for each
TEXTS = {"markdown": tables.as_markdown, "latex": tables.as_latex}
WRITERS = {"csv": export.as_csv, "json": export.as_json}
# Modules with a main(argv) of their own; the first two import torch.
COMMANDS = {
    "case-study": "cli.case_study",
    "attention": "cli.attention",
    "publish": "reporting.publishing",
    "trust": "reporting.trust",
}


@stoppable
def main(argv: list[str] | None = None) -> int:
    show_messages(information_on_stderr=True)
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            return int(import_module(f"delta_transfer.{COMMANDS[argv[0]]}").main(argv[1:]))
        args = arguments(argv, __doc__ or "")
        return watch(args) if args.watch else report(args)
    except UserError as error:
        log.info(f"delta-report: {error}")
        return 1


def watch(args: argparse.Namespace) -> int:
    """Renews the report whenever a run has ended, until it is stopped. Then a page no longer reloads itself."""
    seen = None
    try:
        while True:
            if (found := finished_files(args.dirs)) != seen:
                seen = found
                if sys.stdout.isatty() and not args.output:
                    sys.stdout.write(CLEAR)
                remake(args)
                runs = f"{len(found)} record{'s' * (len(found) != 1)}"
                log.info(f"{args.output or 'report'}: {runs}; made anew when a run ends, until Ctrl-C")
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # without a message, since this is its usual end
    finally:
        if args.format == "html":
            remake(argparse.Namespace(**vars(args) | {"watch": None}))


def remake(args: argparse.Namespace) -> None:
    """Calls `report`, and only logs its errors, which may be gone when the next run has ended."""
    try:
        report(argparse.Namespace(**vars(args)))  # it may change the metric
    except UserError as error:
        log.info(f"delta-report: {error}")


def report(args: argparse.Namespace) -> int:
    usable, others, failed, unusable, on_folds = finished_and_failed(args)
    groups = by_question(usable, args)
    if not groups and not args.against and not args.per_image and others:
        args.metric = next(iter(others))
        groups = by_question(others.pop(args.metric), args)
    if args.against or args.per_image or args.format in NUMBERS:
        for metric, records in others.items():
            task = f"{len(records)} {OF_OTHER_TASKS[metric]} runs"
            log.info(f"left out: {task}, which have no {args.metric} (--metric {metric})")
        others = {}
    if not groups:
        cut = {"cv": " and split.folds", "val": " and split.val_fraction"}.get(args.select, "")
        kind = " that transfer between networks" if args.transfer else ""
        log.info(f"delta-report: no finished runs{kind} with {args.metric}{cut} in {', '.join(map(str, args.dirs))}")
        log.info("Make some with delta-run (see delta-run --help), or name their folder: delta-report DIR")
        return 1

    comparisons, selections = [compare(group, args.metric) for group in groups], []
    if validates(args.metric):
        selections = [choose(comparison, failed) for comparison in comparisons]
        comparisons = [with_choices(*both, args) for both in zip(comparisons, selections, strict=True)]
    for metric, records in others.items():
        comparisons += [compare(group, metric) for group in by_question(records, args)]
    left_out = [f"Left out: {shorten_list(names)}: {reason}" for reason, names in unusable.items()]
    comparisons[0].notes.extend(left_out)
    comparisons[0].on_folds.extend(on_folds)
    for comparison in comparisons:
        for warning in comparison.warnings:
            log.info(warning)
        if args.select and args.format == "csv":  # a CSV file has no place for words
            for line in comparison.chosen:
                log.info(line)
    text = text_of(comparisons, args)
    if args.output:
        write_output(args.output, text)
    else:
        (sys.stderr if args.emit_overrides else sys.stdout).write(text)
    if args.figures:
        from .reporting.drawing import Style
        from .reporting.figures import write_figures

        style = Style(paper=args.style == "paper", caption=not args.no_caption)
        for one in comparisons:
            for path in write_figures(one, args.figures, log.info, baseline_of(one, args), style):
                log.info(f"written: {path}")
    if args.emit_overrides:
        return emit(selections, args.seeds, args.with_paths)
    if args.format == "table" and not args.output and sys.stdout.isatty():
        log.info(f"Next: {next_step(args)}")
    return 0 if all(top.is_dir() for top in args.dirs) else 1


def next_step(args: argparse.Namespace) -> str:
    """The next step after a table on a screen, as a command to copy."""
    choice = ["--select", args.select, "--emit-overrides"] if args.select else []
    folders = [str(top) for top in args.dirs if top.is_dir()]
    return shlex.join(["delta-report", *folders, *(choice or ["--format", "html", "--output", "report.html"])])


def by_question(usable: list[Record], args: argparse.Namespace) -> list[list[Record]]:
    """The records of fine-tuning and those of transfer between networks, which are never in one table."""
    tuned, moved = ([r for r in usable if transfers(r) == wanted] for wanted in (False, True))
    of_transfer = args.against in PROTOCOLS and PROTOCOLS[args.against].of_transfer
    if args.transfer or of_transfer:
        if of_transfer and tuned:
            log.info(f"left out: {len(tuned)} runs of fine-tuning, which are not in {args.against}")
        return [moved] if moved else []
    if args.against and moved:
        log.info(f"left out: {len(moved)} runs that transfer between networks (--against l2t_ww)")
        moved = []
    if args.format in NUMBERS and tuned and moved:
        log.info(f"left out: {len(moved)} runs that transfer between networks, in a table of their own (--transfer)")
        moved = []
    return [group for group in (tuned, moved) if group]


def with_choices(comparison: Comparison, selection: Selection, args: argparse.Namespace) -> Comparison:
    # Without --select this is a remark under the table, which a method with one candidate does not need.
    chosen = [str(choice) for choice in selection.choices if args.select or choice.tried > 1]
    warnings = comparison.warnings + selection.warnings + selection.undecided
    chosen += between_methods(selection.choices, args.prefer, args.metric) if args.select else []
    return replace(comparison, chosen=chosen, warnings=warnings)


def text_of(comparisons: list[Comparison], args: argparse.Namespace) -> str:
    """The whole report. comparisons: of fine-tuning, transfer and verification runs, each with its own tables."""
    methods = dict.fromkeys(method for comparison in comparisons for method in comparison.methods)
    if args.baseline and args.baseline not in methods:
        raise UserError(f"--baseline {args.baseline}: there are no runs of it, only of {', '.join(methods)}.")
    if args.format in NUMBERS:
        return WRITERS[args.format](comparisons[0], baseline_of(comparisons[0], args), args.against)
    made = []
    for comparison in comparisons:
        made += tables_of(comparison, baseline_of(comparison, args), args)
    if args.format == "html":
        from .reporting.page import page

        pictures = sorted(args.pictures.glob("*.png")) if args.pictures else []
        if args.pictures and not pictures:
            log.info(f"no pictures (*.png) in {args.pictures}")
        whole = together(comparisons, comparisons[0].metric)
        return page(made, whole, pictures, log.info, bool(args.watch), args.images)
    if args.format == "table":
        return tables.on_screen(made, terminal=not args.output and sys.stdout.isatty())
    return TEXTS[args.format](made)


def tables_of(comparison: Comparison, baseline: str | None, args: argparse.Namespace) -> list[tables.Table]:
    made: list[tables.Table | None] = []
    if args.layout == "matrix":
        made.append(sections.accuracies(comparison))
        made += [sections.differences(comparison, baseline)] if baseline else []
    else:
        made += leaderboards(comparison, baseline)
    if comparison.metric == PAIRS:
        made.append(sections.verification(comparison))
    if baseline:
        if args.per_image:
            made.append(sections.by_image_table(comparison, baseline, log.info))
        if args.margin is not None:
            made.append(sections.equivalences(comparison, baseline, args.margin))
        made.append(sections.mean_ranks(comparison))
        made += label_curves(comparison)
    if args.layout == "matrix" and not validates(comparison.metric):
        made.append(sections.costs(comparison))
    if args.against:
        made.append(sections.beside_published(comparison, args.against))
    return [table for table in made if table]


def baseline_of(comparison: Comparison, args: argparse.Namespace) -> str | None:
    """The method that others are compared with, if it has runs; None on validation data, which serve to choose."""
    if validates(comparison.metric):
        return None
    usual = "scratch" if comparison.transfers and "scratch" in comparison.methods else "l2"
    wanted = args.baseline or (usual if usual in comparison.methods else comparison.methods[0])
    return wanted if wanted in comparison.methods else None


def finished_and_failed(
    args: argparse.Namespace,
) -> tuple[list[Record], dict[str, list[Record]], list[Record], dict[str, list[str]], list[Record]]:
    """Sorts all records: those for the table; of other tasks, by metric; of failed runs; the names of others, by the
    reason why they cannot be used; and runs on folds beside a table of tested ones.

    stderr gets a line about each run that is not in the table, up to MOST_NAMED.
    """
    for absent in [top for top in args.dirs if not top.is_dir()]:
        log.info(f"no such folder: {absent}")
    records, unfinished = read_all(args.dirs)

    usable: list[Record] = []
    failed: list[Record] = []
    others: dict[str, list[Record]] = {}
    unusable: dict[str, list[str]] = {}
    unvalidated = "without a validation split"  # final runs, which train on all training images
    of_other_tasks = f"of other tasks or of older versions, which have no {args.metric}"
    on_folds = "on folds, which are validated and not tested"  # they serve to choose settings
    of_folds: list[Record] = []
    otherwise_validated = f"{'without' if args.select == 'cv' else 'with'} split.folds"
    left_out = dict.fromkeys([unvalidated, of_other_tasks, on_folds, otherwise_validated], 0)
    skipped = 0
    display = Display("comparing records with their predictions", len(records), "run", quiet_seconds=QUIET)
    for number, record in enumerate(records):
        display.update(number)
        reason = problem(record, args.metric)
        if reason is None and not validates(args.metric):
            reason = against_predictions(record, say=not args.per_image)
        other = next((metric for metric in OF_OTHER_TASKS if problem(record, metric) is None), None)
        lacks = reason == f"no {args.metric}"
        validated = any(is_number(record.get(key)) for key in METRICS if validates(key))
        if lacks and validates(args.metric) and not validated:
            left_out[unvalidated] += 1
        elif lacks and folds(record):
            left_out[on_folds] += 1
            of_folds.append(record)
        elif reason == "no test_top1" and other is not None:
            others.setdefault(other, []).append(record)
        elif lacks and (validates(args.metric) or other is not None or problem(record) is None):
            left_out[of_other_tasks] += 1
        elif reason is not None:
            skipped += 1
            if skipped <= MOST_NAMED:
                log.info(f"skipped {run_id(record)}: {reason}")
            if record.get("error"):
                failed.append(record)
            else:
                unusable.setdefault(reason, []).append(run_id(record))
        elif args.select and (folds(record) is not None) != (args.select == "cv"):
            left_out[otherwise_validated] += 1
        else:
            usable.append(record)
    if skipped > MOST_NAMED:
        log.info(f"skipped {skipped - MOST_NAMED:,} further runs: delta-report trust names each, with the reason")
    for words, count in left_out.items():
        if count:
            log.info(f"left out: {count} runs {words}")
    if unfinished:
        log.info(f"unfinished: {len(unfinished)} ({', '.join(unfinished)})")
    return usable, others, failed, unusable, of_folds


def against_predictions(record: Record, say: bool) -> str | None:
    """`contradiction`. If a file cannot be compared, the record counts. say: whether a message names the file."""
    try:
        return contradiction(record, predictions(record))
    except Damaged as error:
        if say:  # the tables of --per-image name it, too
            log.info(f"not compared with its predictions: {run_id(record)}: {error}")
        return None


def emit(selections: list[Selection], seeds: int, with_paths: bool) -> int:
    """Prints each command once. Returns the exit status, 1 if a method has no command."""
    choices = [choice for selection in selections for choice in selection.choices]
    commands = [command(choice, seeds, with_paths) for choice in choices]
    for choice, line in zip(choices, commands, strict=True):
        if line is None:
            words = shorten_list(refused(choice))
            held = f"no command is made from {words}" if words else "its records do not hold their overrides"
            log.info(f"no command for {choice.what}: {held}")
    for line in dict.fromkeys(filter(None, commands)):
        print(line)
    if any(line and "=???" in line for line in commands):
        log.info(
            "Files and folders in records may be anybody's: type yours in the place of ???, or say --with-paths to "
            "take those of the records."
        )
    return 1 if None in commands or any(selection.undecided for selection in selections) else 0


if __name__ == "__main__":
    sys.exit(main())

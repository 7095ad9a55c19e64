"""delta-report: records of finished runs -> a table of methods.

    delta-report                                   # results/runs, in the terminal
    delta-report --format markdown --output table.md
    delta-report --metric val_top1                 # which hyper-parameters were best on validation data
    delta-report --select cv                       # the same by cross-validation: runs with split.folds only
    delta-report --select cv --emit-overrides      # the commands of the final runs with what was chosen, for | sh

The table goes to stdout or --output; what was left out of it, and why, goes to stderr.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from delta_transfer.reporting import tables
from delta_transfer.reporting.comparison import METRICS, Comparison, compare, folds, problem, run_id
from delta_transfer.reporting.selection import Selection, choose, command

FORMATS = {"markdown": tables.as_markdown, "latex": tables.as_latex, "csv": tables.as_csv}
UNCUT = 100_000  # columns: a pipe or a file has no edge at which to wrap a table


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    usable, failed = finished_and_failed(args)
    if not usable:
        cut = {"cv": " and split.folds", "val": " and split.val_fraction"}.get(args.select, "")
        say(f"delta-report: no finished runs with {args.metric}{cut} in {', '.join(map(str, args.dirs))}")
        say("Make some with delta-run (see delta-run --help), or name their folder: delta-report DIR")
        return 1

    comparison = compare(usable, args.metric)
    selection = None
    if args.metric == "val_top1":
        selection = choose(comparison, failed)
        # Without --select this is a remark under the table: a method with one candidate needs none.
        chosen = [str(choice) for choice in selection.choices if args.select or choice.tried > 1]
        warnings = comparison.warnings + selection.warnings + selection.undecided
        comparison = replace(comparison, chosen=chosen, warnings=warnings)
    for warning in comparison.warnings:
        say(warning)
    if args.select and args.format == "csv":  # which is numbers for other programs, and has no place for words
        for line in comparison.chosen:
            say(line)
    if args.output:
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("w", encoding="utf-8") as file:
                write(comparison, args.format, file)
        except OSError as error:
            say(f"delta-report: {args.output} cannot be written: {error}")
            return 1
    else:
        write(comparison, args.format, sys.stderr if args.emit_overrides else sys.stdout)
    return emit(selection, args.seeds) if args.emit_overrides else 0


def finished_and_failed(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """The records that the table is made of, and those of failed runs; why any is left out goes to stderr."""
    folders = run_folders(args.dirs)
    records = [read(folder) for folder in folders if (folder / "summary.json").exists()]
    unfinished = [folder.name for folder in folders if not (folder / "summary.json").exists()]

    usable, failed, without_validation, on_folds, otherwise_validated = [], [], 0, 0, 0
    for record in records:
        reason = problem(record, args.metric)
        if reason == "no val_top1":  # nothing wrong with it: a final run trains on all training images
            without_validation += 1
        elif reason == "no test_top1" and folds(record):  # nor with this one: it was there to choose settings
            on_folds += 1
        elif reason is not None:
            say(f"skipped {run_id(record)}: {reason}")
            if record.get("error"):
                failed.append(record)
        elif args.select and (folds(record) is not None) != (args.select == "cv"):
            otherwise_validated += 1
        else:
            usable.append(record)
    if without_validation:
        say(f"left out: {without_validation} runs without a validation part")
    if on_folds:
        say(f"left out: {on_folds} runs on folds, which are validated and not tested")
    if otherwise_validated:
        say(f"left out: {otherwise_validated} runs {'without' if args.select == 'cv' else 'with'} split.folds")
    if unfinished:
        say(f"unfinished: {len(unfinished)} ({', '.join(unfinished)})")
    return usable, failed


def emit(selection: Selection, seeds: int) -> int:
    """The commands to stdout, each once; 1 if a method has none."""
    commands = [command(choice, seeds) for choice in selection.choices]
    for choice, line in zip(selection.choices, commands, strict=True):
        if line is None:
            say(f"no command for {choice.what}: its records do not hold their overrides (made by an older delta-run?)")
    for line in dict.fromkeys(filter(None, commands)):
        print(line)
    return 1 if selection.undecided or None in commands else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    if args.select and args.metric == "test_top1":
        p.error("--select chooses on validation data, never on test data: leave out --metric")
    if args.emit_overrides and not args.select:
        p.error("--emit-overrides needs --select: what should be chosen, and on which runs?")
    if args.seeds < 1:
        p.error("--seeds must be at least 1")
    args.metric = args.metric or ("val_top1" if args.select else "test_top1")
    return args


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="delta-report",
        description="Compare methods: mean ± sample std over seeds of finished runs, as a table.",
        epilog="To choose reg settings by cross-validation, run a grid with delta-run -m ... split.folds=3 "
        "split.fold='range(3)', then delta-report --select cv; with --emit-overrides | sh, start the final runs.",
    )
    p.add_argument(
        "dirs",
        nargs="*",
        type=Path,
        metavar="DIR",
        default=[Path("results")],
        help="a results_dir, its runs folder, or any folder of run folders (default: results)",
    )
    p.add_argument("--format", choices=["rich", *FORMATS], default="rich")
    p.add_argument("--metric", choices=list(METRICS), help="default: test_top1")
    p.add_argument(
        "--select",
        choices=["cv", "val"],
        help="name the reg settings with the best validation accuracy for each method, data set and backbone: "
        "mean over the folds of split.folds (cv), or on the hold-out part of split.val_fraction (val)",
    )
    p.add_argument(
        "--emit-overrides",
        action="store_true",
        help="with --select: only the delta-run commands of the chosen settings to stdout, the table to stderr",
    )
    p.add_argument("--seeds", type=int, default=5, metavar="N", help="how many seeds those commands run (default: 5)")
    p.add_argument("--output", type=Path, metavar="FILE", help="write there instead of to stdout")
    return p


def run_folders(dirs: list[Path]) -> list[Path]:
    """The run folders below `dirs`, each once, finished or not."""
    found: dict[Path, Path] = {}
    for top in dirs:
        if (top / "summary.json").exists():  # a single run
            found.setdefault(top.resolve(), top)
            continue
        runs = top / "runs" if (top / "runs").is_dir() else top
        for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
            # Below runs/ all folders are runs; elsewhere a run is known by its files.
            started = folder.is_dir() and (runs.name == "runs" or (folder / "config.yaml").exists())
            if started or (folder / "summary.json").exists():
                found.setdefault(folder.resolve(), folder)
    return list(found.values())


def read(folder: Path) -> dict:
    """The record of one run. One that cannot be read is still a record, so that it is named, not lost."""
    try:
        record = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {"run_id": folder.name, "unreadable": error}
    if not isinstance(record, dict):
        return {"run_id": folder.name, "unreadable": "not a JSON object"}
    return {"run_id": folder.name} | record


def write(comparison: Comparison, form: str, file) -> None:
    if form == "rich":
        console = Console(file=file, highlight=False, width=None if file.isatty() else UNCUT)
        console.print(tables.as_rich(comparison))
    else:
        file.write(FORMATS[form](comparison))


def say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

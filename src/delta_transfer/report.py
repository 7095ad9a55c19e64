"""delta-report: records of finished runs -> a table of methods.

    delta-report                                   # results/runs, in the terminal
    delta-report --format markdown --output table.md
    delta-report --metric val_top1                 # which hyper-parameters were best on validation data

The table goes to stdout or --output; what was left out of it, and why, goes to stderr.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from delta_transfer.reporting import tables
from delta_transfer.reporting.comparison import METRICS, Comparison, compare, problem, run_id

FORMATS = {"markdown": tables.as_markdown, "latex": tables.as_latex, "csv": tables.as_csv}
UNCUT = 100_000  # columns: a pipe or a file has no edge at which to wrap a table


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    folders = run_folders(args.dirs)
    records = [read(folder) for folder in folders if (folder / "summary.json").exists()]
    unfinished = [folder.name for folder in folders if not (folder / "summary.json").exists()]

    usable, without_validation = [], 0
    for record in records:
        reason = problem(record, args.metric)
        if reason is None:
            usable.append(record)
        elif reason == "no val_top1":  # nothing wrong with it: a final run trains on all training images
            without_validation += 1
        else:
            say(f"skipped {run_id(record)}: {reason}")
    if without_validation:
        say(f"left out: {without_validation} runs without a validation part")
    if unfinished:
        say(f"unfinished: {len(unfinished)} ({', '.join(unfinished)})")
    if not usable:
        say(f"delta-report: no finished runs with {args.metric} in {', '.join(map(str, args.dirs))}")
        say("Make some with delta-run (see delta-run --help), or name their folder: delta-report DIR")
        return 1

    comparison = compare(usable, args.metric)
    for warning in comparison.warnings:
        say(warning)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("w", encoding="utf-8") as file:
            write(comparison, args.format, file)
    else:
        write(comparison, args.format, sys.stdout)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="delta-report",
        description="Compare methods: mean ± sample std over seeds of finished runs, as a table.",
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
    p.add_argument("--metric", choices=list(METRICS), default="test_top1")
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

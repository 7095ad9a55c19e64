"""What attention brings, and what every=k changes: variants of DELTA with one strength, compared seed by seed.

    python scripts/attention_study.py [--results DIR] [--seeds 10] [--only every_2,...] [WORD ...]
    python scripts/attention_study.py --read [--results DIR]

Without WORDs the images are the embedded letters, in the protocol of the demo, with DELTA's published strength. WORDs
such as `dataset=folder dataset.root=photos backbone=resnet18` name other images. Each variant has a folder of results.
The command resumes: finished runs are skipped. Then, or with --read alone, it prints a table in Markdown: test
accuracy, the difference to DELTA without attention, whether both are equal within a margin, how well two halves of the
images agree on the channels' ranking, and how many runs failed, as those that diverge.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from delta_transfer.records.reading import Record, read_all
from delta_transfer.reporting.comparison import Cell
from delta_transfer.reporting.statistics import equivalence, paired
from read_study import METRIC, cells_of, table

BASELINE = "delta_noatt"
MARGIN = 1.0  # points within which two variants count as equal
LETTERS = "dataset=glyphs reg.alpha=0.01"
VARIANTS = {
    BASELINE: "reg=delta_noatt",
    "delta": "reg=delta",
    "shuffled": "reg=delta reg.attention.shuffle=${seed}",
    "taylor": "reg=delta reg.attention.method=taylor",
    "probe_train": "reg=delta reg.attention.probe_batchnorm=train",
    "images_32": "reg=delta reg.attention.images=32",
    "images_64": "reg=delta reg.attention.images=64",
    "images_128": "reg=delta reg.attention.images=128",
    "sharp": "reg=delta reg.attention.temperature=1",
    "sharp_shuffled": "reg=delta reg.attention.temperature=1 reg.attention.shuffle=${seed}",
    "every_2": "reg=delta_noatt reg.every=2",
    "every_4": "reg=delta_noatt reg.every=4",
    "every_8": "reg=delta_noatt reg.every=8",
}


def agreement(record: Record) -> str | None:
    """The mean over taps of the rank correlation of two halves of the images; None for a run without attention."""
    found = [value for key, value in (record.get("fit") or {}).items() if key.endswith("/split_half")]
    return f"{sum(found) / len(found):.2f}" if found else None


def row(name: str, cell: Cell | None, failed: int, baseline: Cell) -> list[object]:
    if cell is None or name == BASELINE:
        return [name, cell, None, None, None, failed]
    tested = equivalence(cell, baseline, MARGIN)
    found = tested.found if tested else None
    return [name, cell, paired(cell, baseline), found, agreement(cell.runs[0]), failed]


def reading(folder: Path) -> str:
    """The table of the finished variants. Raises SystemExit without runs of the baseline."""
    records = {name: read_all([folder / name])[0] for name in VARIANTS if (folder / name).is_dir()}
    cells = {name: next(iter(cells_of(of_one).values()), None) for name, of_one in records.items()}
    failed = {name: sum(bool(record.get("error")) for record in of_one) for name, of_one in records.items()}
    baseline = cells.get(BASELINE)
    if baseline is None:
        raise SystemExit(f"{folder}: no finished run of {BASELINE}.")
    header = [
        "variant",
        f"{METRIC} %, mean ± sample std (n)",
        "difference to delta_noatt, 95 % t interval (n)",
        f"within {MARGIN:g} point",
        "two halves agree",
        "failed runs",
    ]
    return table(
        header, [row(name, cell, failed[name], baseline) for name, cell in cells.items() if cell or failed[name]]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="words of delta-run that replace those of the letters")
    parser.add_argument("--results", type=Path, default=Path("results/attention_study"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, in order (default: all)")
    parser.add_argument("--read", action="store_true", help="print the table, and run nothing")
    arguments = parser.parse_args()
    for name in [] if arguments.read else arguments.only.split(","):
        words = [*(arguments.words or LETTERS.split()), *VARIANTS[name].split(), f"seed=range({arguments.seeds})"]
        command = [sys.executable, "-m", "delta_transfer.train", "-m", *words]
        if subprocess.run([*command, f"results_dir={arguments.results / name}"]).returncode > 128:
            sys.exit("stopped; the same command goes on")
    print(reading(arguments.results))


if __name__ == "__main__":
    main()

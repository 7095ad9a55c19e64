"""delta-report publish: puts the records of finished runs into one folder to commit, without paths of this machine.

    delta-report publish results/cub50 --to results/published/cub50
    delta-report results/published/cub50          # the same tables as from the runs

The folder gets records.jsonl, with a line for each run, and predictions.npz, if a run has predictions, similarities of
pairs or channel weights. `delta-report FOLDER --format markdown` makes the tables for a README.md beside them.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..common.console import command_parser, log, shorten_list
from ..common.errors import UserError
from ..records.arrays import channel_attention, pair_similarities, predictions
from ..records.files import read_regular, write_atomically
from ..records.integrity import DIGESTS, with_digest
from ..records.reading import ARRAYS, RECORDS, Record, harmless, log_lines, one_line, read_all, read_bundle, run_id

PATH = re.compile(r"""(?:^|(?<=[=:,'"[{]))(?!//)[/~][^,'"\]}]*""")  # skips the // of an address


def main(argv: list[str]) -> int:
    parser = command_parser("delta-report publish", __doc__)
    parser.add_argument(
        "dirs", nargs="+", type=Path, metavar="RUNS", help="a results_dir, run folders or a published folder"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where records.jsonl is written")
    parser.add_argument(
        "--records-only", action="store_true", help="leave out learning curves, predictions and channel weights"
    )
    args = parser.parse_args(argv)
    for path in publish(args.dirs, args.to, args.records_only):
        log.info(f"written: {path}")
    return 0


def publish(dirs: list[Path], target: Path, records_only: bool = False) -> list[Path]:
    """Writes the bundle of all runs in `dirs`, failed ones too, and returns the paths of its files.

    records_only: it gets no learning curves, predictions or channel weights.

    Log lines name runs that are left out: unfinished, unreadable or there twice. Raises UserError if there is no
    run, a run's metrics or arrays are damaged, `target` holds other runs, or it cannot be written to.
    """
    records, unfinished = read_all(dirs)
    kept: dict[str, Record] = {}
    again: list[str] = []
    for record in records:
        if record.get("unreadable"):
            log.info(f"left out: {run_id(record)}: {one_line(record['unreadable'])}")
        elif run_id(record) in kept:
            again.append(str(record["folder"]))
        else:
            kept[run_id(record)] = record
    if again:
        log.info(f"left out, since a run of the same name comes before: {shorten_list(again)}")
    if unfinished:
        log.info(f"left out, unfinished: {', '.join(unfinished)}")
    if not kept:
        raise UserError(f"There are no finished runs in {', '.join(map(str, dirs))}.")
    before = read_bundle(target) if (target / RECORDS).is_file() else []
    if lost := [run_id(record) for record in before if not record.get("unreadable") and run_id(record) not in kept]:
        raise UserError(
            f"{target / RECORDS} holds runs that are not among these: {shorten_list(lost)}. Name {target} among RUNS "
            "to keep them, or remove the file."
        )

    made = [line_of(record, curves=not records_only) for record in kept.values()]
    lines = [json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in made]
    with_arrays = {} if records_only else kept
    stored = {f"{name}/{key}": a for name, record in with_arrays.items() for key, a in arrays_of(record).items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / RECORDS, "".join(f"{line}\n" for line in lines).encode())
        (target / ARRAYS).unlink(missing_ok=True)
        if stored:
            packed = io.BytesIO()
            np.savez_compressed(packed, allow_pickle=False, **stored)
            write_atomically(target / ARRAYS, packed.getvalue())
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from None
    return [path for path in (target / RECORDS, target / ARRAYS) if path.exists()]


def line_of(record: Record, curves: bool) -> Record:
    """A run's line of records.jsonl."""
    kept = {key: value for key, value in record.items() if key not in ("folder", "bundled", "metrics")}
    classes = record["folder"] / "classes.json"
    if not record.get("bundled") and classes.exists():
        try:
            kept["classes"] = harmless(json.loads(read_regular(classes)))
        except (OSError, ValueError) as error:
            raise UserError(f"{classes} cannot be read: {error}") from None
    line = {key: without_paths(value) for key, value in kept.items()} | {"metrics": log_lines(record) if curves else []}
    return with_digest(line) if DIGESTS in line else line


def arrays_of(record: Record) -> dict[str, np.ndarray]:
    """A run's arrays in predictions.npz, by the names that records/reading.py looks for."""
    found: dict[str, np.ndarray] = {}
    for part in (predictions(record), pair_similarities(record)):
        found |= vars(part) if part else {}
    attention = channel_attention(record)
    return found | {f"attention/{tap}": v for tap, v in (attention.importance if attention else {}).items()}


def without_paths(value: Any) -> Any:
    """The same value with every absolute path cut to its last component, also inside command lines."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and "/" in value:
        # key=/a/b -> key=b, [{use:/a/b,taps:[c]}] -> [{use:b,taps:[c]}]
        return " ".join(PATH.sub(lambda found: Path(found[0]).name, word) for word in value.split(" "))
    return value

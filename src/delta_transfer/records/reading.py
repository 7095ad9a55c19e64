"""Reads the records (summary.json) and the metrics of runs. `arrays.py` reads their arrays.

A run has a folder of its own, as delta-run leaves it, or is in a bundle: one folder for many runs, as `delta-report
publish` makes it. A bundle has `records.jsonl`, a line for each run (its summary.json, the lines of its metrics.jsonl
as "metrics", its class names as "classes"), and `predictions.npz` with arrays named `<run_id>/logits` and so on. The
functions below take the record of either kind. No value is filled in: a damaged file is named, and the rest is used.
Nothing here imports torch.
"""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ..common.console import spelled_out
from ..common.errors import UserError
from .files import MIB, read_regular
from .integrity import problem_of

if TYPE_CHECKING:  # slow to import, and most tables do not need it
    import pandas as pd

Record = dict[str, Any]  # summary.json with its `folder`; any other key may be missing

LONGEST_RECORD = 64 * MIB
RECORDS, ARRAYS = "records.jsonl", "predictions.npz"  # the files of a bundle


class Damaged(UserError):
    """A file of a run cannot be read; the message names it."""


# ---- fields of a record; any of them may be missing ------------------------------------------------------


def run_id(record: Record) -> str:
    return str(record.get("run_id"))


def config_of(record: Record) -> Record:
    config = record.get("config")
    return config if isinstance(config, dict) else {}


def section(record: Record, group: str) -> Record:
    """One group of the configuration, such as "reg"; {} if there is none."""
    value = config_of(record).get(group)
    return value if isinstance(value, dict) else {}


def method_of(record: Record) -> str:
    return str(section(record, "reg")["name"])


def method_title(record: Record) -> str:
    """The display name of the run's method ("DELTA w/o ATT"); its name if the record has no title."""
    titles = record.get("titles")
    title = titles.get("method") if isinstance(titles, dict) else None
    return one_line(title) if isinstance(title, str) else method_of(record)


def seed(record: Record) -> object:
    return record.get("seed", config_of(record).get("seed"))


def folds(record: Record) -> int | None:
    """The number of folds of a run of cross-validation."""
    count = section(record, "split").get("folds")
    return count if isinstance(count, int) else None


def stages(record: Record) -> int:
    """The number of stages of training, each of which takes the whole schedule."""
    found = record.get("stages")
    return len(found) if isinstance(found, list) and found else 1


def begins_at_random(record: Record) -> bool:
    return section(record, "backbone").get("weights") == "none"


def recorded_sources(record: Record) -> list[Record]:
    """The networks that a run learned from, other than the one that its target started from."""
    known = record.get("sources")
    return [source for source in known if isinstance(source, dict)] if isinstance(known, list) else []


def names_of_sources(record: Record) -> list[str]:
    return [str(source.get("name")) for source in recorded_sources(record)]


def transfers(record: Record) -> bool:
    """True if the target begins with random weights or learns from networks that it does not start from."""
    return begins_at_random(record) or bool(recorded_sources(record))


def attention_options(record: Record) -> Record | None:
    """The section reg.attention; for a sum, that of the first term which has one."""
    reg = section(record, "reg")
    terms = reg.get("terms")
    methods = [reg, *(terms.values() if isinstance(terms, dict) else ())]
    found = (method.get("attention") for method in methods if isinstance(method, dict))
    return next((options for options in found if isinstance(options, dict)), None)


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite number; unlike math.isfinite it takes integers beyond the range of floats."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def one_line(value: object) -> str:
    return " ".join(str(value).split())


# ---- records ---------------------------------------------------------------------------------------------


def read_all(dirs: list[Path]) -> tuple[list[Record], list[str]]:
    """The records of all finished runs in `dirs`, and the names of the unfinished ones; each run once."""
    bundles = {top.resolve(): top for top in dirs if (top / RECORDS).is_file()}
    folders = run_folders(dirs)
    finished = {folder: (folder / "summary.json").exists() for folder in folders}
    records = [record for bundle in bundles.values() for record in read_bundle(bundle)]
    unfinished = [folder.name for folder in folders if not finished[folder]]
    return records + [read(folder) for folder in folders if finished[folder]], unfinished


def run_folders(dirs: list[Path]) -> list[Path]:
    """The run folders in `dirs`, each once, finished or not."""
    found: dict[Path, Path] = {}
    for top in dirs:
        if (top / "summary.json").exists():  # a single run
            found.setdefault(top.resolve(), top)
            continue
        runs = top / "runs" if (top / "runs").is_dir() else top
        for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
            # Below runs/ all folders are runs; elsewhere a run is recognised by its files.
            started = folder.is_dir() and (runs.name == "runs" or (folder / "config.yaml").exists())
            if started or (folder / "summary.json").exists():
                found.setdefault(folder.resolve(), folder)
    return list(found.values())


def finished_files(dirs: list[Path]) -> dict[Path, int]:
    """The files that hold the records in `dirs`, with the time of their last change in ns."""
    files = [top / RECORDS for top in dirs] + [folder / "summary.json" for folder in run_folders(dirs)]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


def read(folder: Path) -> Record:
    """The record of one run, with its `folder`. A damaged one is a record too, with the reason as `unreadable`.

    Control characters in it are spelled out, because its texts may end up on a terminal, in a table or in a figure.
    """
    known: Record = {"run_id": spelled_out(folder.name), "folder": folder}
    try:
        text = read_regular(folder / "summary.json", LONGEST_RECORD).decode()
    except (OSError, ValueError) as error:
        return known | {"unreadable": error}
    return known | _record_of(text) | {"folder": folder, "bundled": False}


def read_bundle(folder: Path) -> list[Record]:
    """The records of a bundle, as `read` gives them. Raises Damaged if its file cannot be read at all."""
    path = folder / RECORDS
    try:
        lines = read_regular(path).decode().split("\n")
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    return [
        {"run_id": f"{path}, line {number}"} | _record_of(line) | {"folder": folder, "bundled": True}
        for number, line in enumerate(lines, 1)
        if line
    ]


def _record_of(text: str) -> Record:
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            return {"unreadable": "not a JSON object"}
        if problem := problem_of(record):
            return {"unreadable": problem}
        if _is_plain(text):
            return record
        # The function `metrics` treats the lines of a bundle as it treats those of a file.
        return {spelled_out(key): value if key == "metrics" else harmless(value) for key, value in record.items()}
    except (ValueError, RecursionError):
        return {"unreadable": "it is damaged: not a whole JSON object"}


def _is_plain(text: str) -> bool:
    """Whether no text of this JSON has anything to spell out. To look at each of its texts takes long."""
    return "\\" not in text and text.replace("\n", "").isprintable()


def harmless(value: object) -> Any:
    """JSON with the control characters of its texts spelled out."""
    if isinstance(value, dict):
        deep = (str, dict, list)  # most entries of metrics are numbers, and a call for each takes long
        return {spelled_out(key): harmless(v) if isinstance(v, deep) else v for key, v in value.items()}
    if isinstance(value, list):
        return [harmless(entry) for entry in value]
    return spelled_out(value) if isinstance(value, str) else value


# ---- metrics ---------------------------------------------------------------------------------------------


def metrics(record: Record) -> "pd.DataFrame | None":
    """A row for each log line: step, lr, loss terms, accuracies; NaN for values that were not measured. None: no lines.

    Raises Damaged.
    """
    import pandas as pd

    rows = [row for _, row in _lines_and_rows(record)]
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    return frame if frame["step"].is_unique else frame.drop_duplicates("step", keep="last")  # slow, and rarely needed


def log_lines(record: Record) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without an incomplete last one of a killed run. Raises Damaged for other damage."""
    return [line for line, _ in _lines_and_rows(record)]


def _lines_and_rows(record: Record) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Each line of metrics as it was written, and its numbers."""
    lines: list[Any]
    plain = False
    if record.get("bundled"):
        place = f"{record['folder'] / RECORDS}, metrics of {run_id(record)}"
        lines = found if isinstance(found := record.get("metrics"), list) else []
    else:
        place = record["folder"] / "metrics.jsonl"
        try:
            text = read_regular(place).decode()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise Damaged(f"{place} cannot be read: {error}") from None
        lines = text[: text.rfind("\n") + 1].splitlines()
        plain = _is_plain(text)
    checked = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line) if isinstance(line, str) else line
            content = content if plain else harmless(content)
            checked.append((content, _row_of(content)))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise Damaged(f"{place}, line {number}, is not a line of metrics: {str(line)[:60]!r}") from None
    return checked


def _row_of(line: dict[str, Any]) -> dict[str, float]:
    step = line["step"]
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError("not a line of metrics")
    # A value that no fp32 number can have was not measured. A text has no absolute value: TypeError.
    numbers = {n: math.nan if v is None or not abs(v) < 3.5e38 else float(v) for n, v in line.items()}
    return numbers | {"step": step}

"""What runs left on disk, read: folders, records (summary.json), metrics.jsonl, predictions.npz, pairs.npz.

Nothing is ever filled in: what cannot be read is named, and the rest is used.
"""

import json
import math
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..common.untrusted import most_unpacked, spelled_out

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


NOT_TERMS = re.compile(
    "step|stage|lr|attention_.*|cross_entropy|loss|gradient_norm|train_top1|images_per_second|(test|val)_.*"
)

# The amount of a pair of taps that L2T-ww matched; term: of a sum.
PAIR = re.compile(r"attention_(?:(?P<term>[^>]*)\.)?(?P<source>[^.>]+)>(?P<target>[^.>]+)")


def penalty_terms(columns: Iterable[str]) -> list[str]:
    """Those of a metrics line that are loss terms beside the cross-entropy; Inception's auxiliary one is among them."""
    return [name for name in columns if not NOT_TERMS.fullmatch(name)]


def matched_pairs(columns: Iterable[str], sources: Iterable[str]) -> dict[str, dict[tuple[str, str], str]]:
    """Those of a metrics line that are the amounts of pairs: by (source tap, target tap), in turn by source network.

    `sources`: names of the networks that the run learned from, without the one that its target started from.
    """
    longest_first = sorted(sources, key=len, reverse=True)
    found: dict[str, dict[tuple[str, str], str]] = {}
    for column in columns:
        if pair := PAIR.fullmatch(column):
            key = pair["source"]
            name = next((name for name in longest_first if key.startswith(f"{name}/")), None)
            tap = key.removeprefix(f"{name}/") if name else key
            title = ", ".join(filter(None, [pair["term"], name or "source network"]))
            found.setdefault(title, {})[tap.replace("/", "."), pair["target"].replace("/", ".")] = column
    return found


class Damaged(UserError):
    """A file of a run that cannot be read; the message names it."""


@dataclass(frozen=True)
class Predictions:
    """Of the test part at the last iteration."""

    labels: "np.ndarray"  # (N,)
    logits: "np.ndarray"  # (N, K)
    index: "np.ndarray"  # (N,): which images of the data set, in the order of its file list

    @property
    def correct(self) -> "np.ndarray":
        """(N,) bool."""
        return self.logits.argmax(axis=1) == self.labels


@dataclass(frozen=True)
class PairSimilarities:
    """Of the test pairs of a verification at the last iteration, (P,) each."""

    similarities: "np.ndarray"
    same: "np.ndarray"  # bool
    fold: "np.ndarray"


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
    """The record of one run, with its `folder`. One that cannot be read is still a record: named, not lost.

    Control characters in it are spelled out: what it says may end up on a terminal, in a table or in a figure.
    """
    known = {"run_id": spelled_out(folder.name), "folder": folder}
    try:
        record = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        record = harmless(record)
    except (OSError, ValueError, RecursionError) as error:
        return known | {"unreadable": error}
    if not isinstance(record, dict):
        return known | {"unreadable": "not a JSON object"}
    return known | record | {"folder": folder}


def harmless(value: object) -> object:
    """JSON with the control characters of its texts spelled out."""
    if isinstance(value, dict):
        return {spelled_out(key): harmless(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [harmless(entry) for entry in value]
    return spelled_out(value) if isinstance(value, str) else value


def metrics(record: dict) -> "pd.DataFrame | None":
    """metrics.jsonl, a row per log line: step, lr, each loss term, accuracies where they were measured (else NaN).

    None if the run has no such file. Raises Damaged if a line cannot be read; a last line without its end, which a
    killed run leaves, is not looked at.
    """
    import pandas as pd

    path = record["folder"] / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    whole = text[: text.rfind("\n") + 1].splitlines()
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            row = harmless(json.loads(line))
            if (
                type(row["step"]) is not int
                or not 0 <= row["step"] < 2**53
                or any(isinstance(v, str) for v in row.values())
            ):
                raise ValueError
            # What no fp32 number can be was not measured.
            numbers = {name: math.nan if value is None else float(value) for name, value in row.items()}
            rows.append({k: v if abs(v) < 3.5e38 else math.nan for k, v in numbers.items()} | {"step": row["step"]})
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise Damaged(f"{path}, line {number}, is not a line of metrics: {line[:60]!r}") from None
    if not rows:
        return None
    return pd.DataFrame(rows).drop_duplicates("step", keep="last")


def predictions(record: dict) -> Predictions | None:
    """predictions.npz; None if the run has none (one on folds, or a record without its outputs). Raises Damaged."""
    import numpy as np

    path = record["folder"] / "predictions.npz"
    made = _arrays(path, Predictions)
    if made is None:
        return None
    numbers = made.logits.dtype.kind == "f" and made.labels.dtype.kind == made.index.dtype.kind == "i"
    n = made.logits.shape[0] if numbers and made.logits.ndim == 2 and made.logits.shape[1] else 0
    if not n or not made.labels.shape == made.index.shape == (n,) or not np.isfinite(made.logits).all():
        raise Damaged(f"{path}: labels, logits and index do not belong together")
    return made


def pair_similarities(record: dict) -> PairSimilarities | None:
    """pairs.npz; None if the run has none. Raises Damaged."""
    import numpy as np

    path = record["folder"] / "pairs.npz"
    made = _arrays(path, PairSimilarities)
    if made is None:
        return None
    kinds = "".join(values.dtype.kind for values in vars(made).values())
    shapes = {values.shape for values in vars(made).values()}
    whole = kinds == "fbi" and len(shapes) == 1 and made.same.ndim == 1 and np.isfinite(made.similarities).all()
    if not whole or not made.same.any() or made.same.all():
        raise Damaged(f"{path}: similarities, same and fold do not belong together")
    return made


def _arrays(path: Path, kind: type):
    """The arrays of a file that the fields of `kind` name, as one of it; None if there is no file. Raises Damaged."""
    import numpy as np

    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > most_unpacked(path.stat().st_size):
                raise ValueError("a decompression bomb")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return kind(**{field.name: arrays[field.name] for field in fields(kind)})
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        raise Damaged(f"{path} cannot be read: {error}") from None

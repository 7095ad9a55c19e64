"""The arrays of a run: predictions, similarities of pairs, channel weights. Nothing here imports torch.

The functions take the record of a run in a folder of its own, or of one in a bundle (reading.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from ..common.console import spelled_out
from .files import most_unpacked, open_regular, read_safetensors
from .integrity import WHAT_TO_DO, array_digest, digest_of
from .reading import ARRAYS, Damaged, Record, attention_options, is_number, run_id, section

PREDICTIONS = ("labels", "logits", "index")
VALUES = ("labels", "predicted", "index")  # of measurements, in their unit
SIMILARITIES = ("similarities", "same", "fold")
VALIDATION = "validation"  # the file of the predictions for held-out training images, beside predictions.npz
ATTENTION = "attention.safetensors"
LARGEST = 64 * 2**30  # bytes of a file of arrays


@dataclass(frozen=True)
class Predictions:
    """The outputs for N test images, or held-out training images, at the last iteration."""

    labels: np.ndarray  # (N,)
    logits: np.ndarray  # (N, K)
    index: np.ndarray  # (N,): which images of the data set, in the order of its file list

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool."""
        right: np.ndarray = self.logits.argmax(axis=1) == self.labels
        return right


@dataclass(frozen=True)
class PairSimilarities:
    """The similarities of the P test pairs of a verification run at the last iteration, (P,) each."""

    similarities: np.ndarray
    same: np.ndarray  # bool
    fold: np.ndarray


@dataclass(frozen=True)
class ChannelAttention:
    """The result of DELTA's attention before training, by tap, in the order of backbone.taps."""

    importance: dict[str, np.ndarray]  # v, (C,): the rise of the probe's loss without a channel, in nats
    weights: dict[str, np.ndarray]  # C * w, (C,), mean 1
    source: str | None  # the fingerprint of the source network's weights, if it is known


def predictions(record: Record, what: str = "predictions") -> Predictions | None:
    """The predictions of a run for its test images, or for the held-out ones (VALIDATION); None if it has none.

    Bundles hold only predictions for test images. Raises Damaged.
    """
    if what == VALIDATION and record.get("bundled"):
        return None
    arrays, place = _arrays(record, f"{what}.npz", PREDICTIONS)
    if arrays is None:
        return None
    _check_digest(record, what, arrays, place)
    made = Predictions(**arrays)
    numbers = made.logits.dtype.kind == "f" and made.labels.dtype.kind == made.index.dtype.kind == "i"
    n = made.logits.shape[0] if numbers and made.logits.ndim == 2 and made.logits.shape[1] else 0
    if not n or not made.labels.shape == made.index.shape == (n,) or not np.isfinite(made.logits).all():
        raise Damaged(f"{place}: labels, logits and index do not belong together")
    return made


def pooled(parts: Sequence[Predictions]) -> Predictions:
    """One prediction with the mean logits for each image in any of the parts, in the order of the data set."""
    index, place, count = np.unique(
        np.concatenate([part.index for part in parts]), return_inverse=True, return_counts=True
    )
    logits = np.zeros((len(index), parts[0].logits.shape[1]))
    np.add.at(logits, place, np.concatenate([part.logits for part in parts]))
    labels = np.zeros(len(index), int)
    labels[place] = np.concatenate([part.labels for part in parts])
    return Predictions(labels, logits / count[:, None], index)


def image_names(record: Record, what: str = "predictions") -> list[str] | None:
    """The names (N,) of the images in `predictions`; None if they were not recorded. Raises Damaged."""
    if record.get("bundled"):
        return None
    arrays, place = _arrays(record, f"{what}.npz", (), optional=("names",))
    names = (arrays or {}).get("names")
    if names is None:
        return None
    if names.dtype.kind != "U" or names.ndim != 1:
        raise Damaged(f"{place}: names are not a list of texts")
    return [spelled_out(str(name)) for name in names]


def pair_similarities(record: Record) -> PairSimilarities | None:
    """The similarities of a verification run's test pairs; None if it has none. Raises Damaged."""
    arrays, place = _arrays(record, "pairs.npz", SIMILARITIES)
    if arrays is None:
        return None
    _check_digest(record, "pairs", arrays, place)
    made = PairSimilarities(**arrays)
    kinds, shapes = [values.dtype.kind for values in arrays.values()], {values.shape for values in arrays.values()}
    whole = (
        kinds == ["f", "b", "i"] and len(shapes) == 1 and made.same.ndim == 1 and np.isfinite(made.similarities).all()
    )
    if not whole or not made.same.any() or made.same.all():
        raise Damaged(f"{place}: similarities, same and fold do not belong together")
    return made


def channel_weights(record: Record) -> "dict[str, np.ndarray] | None":
    """The weights of `channel_attention`; None if the run has none. Raises Damaged."""
    attention = channel_attention(record)
    return None if attention is None else attention.weights


def channel_attention(record: Record) -> ChannelAttention | None:
    """The channel attention of a run; None if it has none. Raises Damaged.

    w = softmax((v - mean v) / (T * std v)) with the population standard deviation, uniform where all v are equal
    (methods/attention.py, methods/delta.py).
    """
    temperature: Any = (attention_options(record) or {}).get("temperature")
    taps: Any = section(record, "backbone").get("taps")
    named = isinstance(taps, list) and bool(taps) and all(isinstance(tap, str) for tap in taps)
    usable = named and is_number(temperature) and temperature > 0
    source: str | None = None
    if record.get("bundled"):
        found, place = _arrays(record, ATTENTION, [f"attention/{tap}" for tap in taps]) if usable else (None, "")
        fitted = found and {name.removeprefix("attention/"): values for name, values in found.items()}
    else:
        place = str(record["folder"] / ATTENTION)
        fitted, source = _fitted(record["folder"] / ATTENTION)
    if fitted is None:
        return None
    if not usable:
        raise Damaged(f"{run_id(record)}: its record has no reg.attention.temperature or no backbone.taps")
    weights = {}
    for tap in taps:
        v = fitted.get(tap)
        if v is None or v.ndim != 1 or not v.size or v.dtype.kind != "f" or not np.isfinite(v).all():
            raise Damaged(f"{place} has no finite importances of the channels of {tap}")
        v = fitted[tap] = v.astype(np.float64)
        scaled = (v - v.mean()) / (temperature * v.std()) if v.std() else np.zeros_like(v)
        powers = np.exp(scaled - scaled.max())
        weights[tap] = len(v) * powers / powers.sum()
    return ChannelAttention({tap: fitted[tap] for tap in taps}, weights, source)


def _fitted(path: Path) -> tuple[dict[str, np.ndarray] | None, str | None]:
    """The importances and the source fingerprint in a file of records/checked.py. Raises Damaged."""
    if not path.exists():
        return None, None
    try:
        arrays, metadata = read_safetensors(path, "np")
        if metadata.get("sha256", expected := array_digest(arrays)) != expected:
            raise ValueError("its checksum is wrong")
    except (ValueError, TypeError, OSError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    return arrays, metadata.get("weights")


def _check_digest(record: Record, what: str, arrays: dict[str, np.ndarray], place: str) -> None:
    """Raises Damaged for arrays that are not those of the run."""
    if (expected := digest_of(record, what)) is not None and array_digest(arrays) != expected:
        raise Damaged(f"{place}: the {what} of {run_id(record)} were changed after the run ended: {WHAT_TO_DO}")


def _arrays(
    record: Record, name: str, keys: Iterable[str], optional: Iterable[str] = ()
) -> tuple[dict[str, np.ndarray] | None, str]:
    """The arrays `keys` of a run, from its file `name` or its bundle, and that file; None if absent. Raises Damaged."""
    bundled = bool(record.get("bundled"))
    path = record["folder"] / (ARRAYS if bundled else name)
    prefix = f"{run_id(record)}/" if bundled else ""
    if not path.exists():
        return None, str(path)
    try:
        arrays = _opened(path, path.stat().st_mtime_ns)
        if bundled and not any(prefix + key in arrays for key in keys):
            return None, str(path)
        there = [key for key in optional if prefix + key in arrays]
        return {key: arrays[prefix + key] for key in [*keys, *there]}, str(path)
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        raise Damaged(f"{path} cannot be read: {error}") from None


@lru_cache(maxsize=1)
def _opened(path: Path, changed: int) -> NpzFile:
    """The arrays of a file that was `changed` at this time in ns, each of which is read when it is asked for.

    The file stays open for the other runs of a bundle, whose list of arrays takes longer to read than those of a run.
    """
    opened = open_regular(path, LARGEST)
    try:
        arrays = NpzFile(opened, own_fid=True, allow_pickle=False)
        assert arrays.zip is not None
        if sum([entry.file_size for entry in arrays.zip.infolist()]) > most_unpacked(path.stat().st_size):
            raise ValueError("a decompression bomb")
    except BaseException:
        opened.close()
        raise
    return arrays

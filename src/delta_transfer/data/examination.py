"""Finds what is wrong with the images of a data set: `delta-data verify` and `delta-data doctor` decode all of them."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common import cores
from ..common.console import shorten_list
from ..records.files import write_atomically
from .contents import stamps_of
from .dataset import Dataset
from .images import UNREADABLE, holds_several_pictures

SHOWN = 20  # names in a line
LEAKS = "test images that are also in train"
# Two images are nearly the same if few of the 64 bits of their hashes differ and their thumbnails of 16 x 16 grey
# values differ little: the hashes of images with little contrast mean nothing.
HASH_BITS, THUMBNAIL_LEVELS, LEAST_CONTRAST = 6, 5.0, 4.0


@dataclass(frozen=True)
class Look:
    """One decoded image."""

    digest: bytes  # of its size and RGB pixels
    constant: bool  # all pixels are the same
    several: bool  # its file holds more pictures, and the first was decoded
    bits: np.ndarray  # (64,) bool, a hash of its low frequencies
    thumbnail: np.ndarray  # (256,) float32 grey values


@dataclass
class Examination:
    dataset: Dataset
    unreadable: dict[int, str] = field(default_factory=dict)  # index: why
    constant: list[int] = field(default_factory=list)
    several: list[int] = field(default_factory=list)
    leaks: list[tuple[int, int]] = field(default_factory=list)  # test image, training image: the same pixels
    conflicts: list[tuple[int, int]] = field(default_factory=list)  # the same pixels, and two labels
    twice: int = 0  # training images with copies
    near_leaks: list[tuple[int, int]] = field(default_factory=list)  # as above, for nearly the same pixels
    near_conflicts: list[tuple[int, int]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Sentences about what was found. The first one, about leaks, always comes."""
        names, pairs = self.dataset.names, self._named
        yield f"{LEAKS}: {pairs(self.leaks) or 'none'}"
        if self.conflicts:
            yield f"label conflicts, one image with two labels: {pairs(self.conflicts, labels=True)}"
        if self.twice:
            yield f"training images that are there more than once: {self.twice:,}"
        if self.near_leaks:
            yield f"test images that look like one in train: {pairs(self.near_leaks)}"
        if self.near_conflicts:
            yield f"images that look the same and have two labels: {pairs(self.near_conflicts, labels=True)}"
        if self.constant:
            yield constant_images([names[index] for index in self.constant])
        if self.several:
            yield only_first_pictures([names[index] for index in self.several])

    def _named(self, pairs: list[tuple[int, int]], labels: bool = False) -> str:
        def name(index: int) -> str:
            return self.dataset.names[index] + (f" ({self.dataset.class_of(index)})" if labels else "")

        words = [f"{name(one)} = {name(other)}" for one, other in pairs]
        return f"{len(pairs):,}: {shorten_list(words, SHOWN)}" if pairs else ""


def constant_images(names: list[str]) -> str:
    """The sentence about images of one colour. A run logs it, too."""
    return f"images of one colour only, which show nothing: {len(names):,} ({shorten_list(names)})"


def only_first_pictures(names: list[str]) -> str:
    """The sentence about animations and files of many pages. A run and delta-predict log it, too."""
    return f"files of several pictures, of which only the first is read: {len(names):,} ({shorten_list(names)})"


def examine(dataset: Dataset, progress: Callable[[int], None] = lambda done: None) -> Examination:
    """Decodes all images and compares them. progress: called with the number of images done."""
    found = Examination(dataset)
    looks: dict[int, Look] = {}
    with ThreadPoolExecutor(cores.USABLE) as pool:
        for index, outcome in enumerate(pool.map(lambda one: _look(dataset, one), range(len(dataset.labels)))):
            if isinstance(outcome, Look):
                looks[index] = outcome
            else:
                found.unreadable[index] = outcome
            progress(index + 1)
    found.constant = [index for index, look in looks.items() if look.constant]
    found.several = [index for index, look in looks.items() if look.several]
    _compare_pixels(found, looks)
    if dataset.pairs is None and dataset.files:  # embedded images look alike by design
        _compare_appearance(found, {index: look for index, look in looks.items() if not look.constant})
    return found


def _look(dataset: Dataset, index: int) -> Look | str:
    try:
        image = dataset.load(index)
        digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()
        constant = all(low == high for low, high in map(Image.Image.getextrema, image.split()))
        grey = image.convert("L")
        thumbnail = np.asarray(grey.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()
        several = bool(dataset.files) and holds_several_pictures(dataset.files[index])
        return Look(digest, constant, several, perceptual_hash(grey), thumbnail)
    except UNREADABLE as error:
        return str(error) or type(error).__name__


def perceptual_hash(grey: Image.Image) -> np.ndarray:
    """(64,) bool: which of the 8 x 8 lowest frequencies are above their median (Zauner, 2010, section 3.2.1)."""
    from scipy.fft import dctn  # takes a while to import

    small = np.asarray(grey.resize((32, 32), Image.Resampling.BOX), dtype=np.float32)
    low = dctn(small, norm="ortho")[:8, :8].ravel()
    return np.asarray(low > np.median(low))


def _compare_pixels(found: Examination, looks: dict[int, Look]) -> None:
    dataset, by_digest = found.dataset, dict[bytes, list[int]]()
    for index, look in looks.items():
        by_digest.setdefault(look.digest, []).append(index)
    for same in by_digest.values():
        train = [index for index in same if not dataset.is_test[index]]
        found.leaks += [(index, train[-1]) for index in same if train and dataset.is_test[index]]
        found.twice += max(0, len(train) - 1)
        if dataset.pairs is None and not looks[same[0]].constant:
            found.conflicts += [(same[0], i) for i in same if dataset.labels[i] != dataset.labels[same[0]]]
    found.leaks.sort()
    found.conflicts.sort()


def _compare_appearance(found: Examination, looks: dict[int, Look]) -> None:
    """Finds images that look nearly the same, one in test and one in train, or with two labels."""
    dataset = found.dataset
    chosen = np.array([i for i, look in looks.items() if look.thumbnail.std() >= LEAST_CONTRAST], dtype=np.int64)
    if not len(chosen):
        return
    hashes = np.packbits([looks[index].bits for index in chosen.tolist()], axis=1).view(np.uint64).ravel()
    thumbnails = np.stack([looks[index].thumbnail for index in chosen.tolist()])
    labels, is_test = dataset.labels[chosen], dataset.is_test[chosen]
    for start in range(0, len(chosen), 256):
        rows = slice(start, start + 256)
        near = np.bitwise_count(hashes[rows, None] ^ hashes[None, :]) <= HASH_BITS
        near &= (labels[rows, None] != labels) | (is_test[rows, None] != is_test)
        for one, other in np.argwhere(near).tolist():
            one += start
            if one >= other or np.abs(thumbnails[one] - thumbnails[other]).mean() > THUMBNAIL_LEVELS:
                continue
            pair = int(chosen[one]), int(chosen[other])
            if looks[pair[0]].digest == looks[pair[1]].digest:
                continue
            if labels[one] != labels[other]:
                found.near_conflicts.append(pair)
            if is_test[one] != is_test[other]:
                found.near_leaks.append(pair if is_test[one] else pair[::-1])
    found.near_leaks.sort()


def examined_before(dataset: Dataset, reading: str, progress: Callable[[int], None]) -> Examination:
    """As `examine`, but it decodes nothing if no file and no label changed since the last time.

    reading: the options of reading, in words. `dataset.cache_dir`/examined remembers the result.
    """
    key = [reading, dataset.listing, *map(str, dataset.labels.tolist()), *map(str, dataset.is_test.tolist())]
    cache = _remembered_in(dataset, "examined", key)
    if (known := _read(cache)) is not None:
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            known["unreadable"] = {int(index): str(why) for index, why in known["unreadable"].items()}
            return Examination(dataset, **known)
    found = examine(dataset, progress)
    _remember(cache, {entry.name: getattr(found, entry.name) for entry in fields(found) if entry.name != "dataset"})
    return found


def _remembered_in(dataset: Dataset, folder: str, words: Sequence[str]) -> Path | None:
    """The file below `dataset.cache_dir` that remembers what was found in these images; None without such a folder."""
    key = hashlib.sha256("\n".join([*words, *map(os.path.abspath, dataset.files)]).encode(errors="surrogateescape"))
    key.update(stamps_of(dataset.files).tobytes())
    return dataset.cache_dir / folder / f"{key.hexdigest()[:16]}.json" if dataset.cache_dir else None


def _read(cache: Path | None) -> dict[str, Any] | None:
    """What a file remembers; None if there is none, or it is damaged."""
    with suppress(OSError, ValueError):
        if cache is not None and isinstance(found := json.loads(cache.read_text()), dict):
            return found
    return None


def _remember(cache: Path | None, found: object) -> None:
    if cache is not None and cache.parent.parent.is_dir():  # a dry run makes no folder
        with suppress(OSError):
            cache.parent.mkdir(exist_ok=True)
            write_atomically(cache, json.dumps(found).encode())


def unreadable_images(dataset: Dataset, reading: str) -> dict[int, str]:
    """The images that cannot be decoded, and why. Decodes all of them, unless none changed since the last time.

    reading: the options of reading, in words. `dataset.cache_dir`/unreadable remembers the result.
    """
    cache = _remembered_in(dataset, "unreadable", [reading])
    if (known := _read(cache)) is not None:
        with suppress(ValueError):
            return {int(index): str(why) for index, why in known.items()}

    def why(index: int) -> str | None:
        try:
            dataset.load(index)
        except UNREADABLE as error:
            return str(error) or type(error).__name__
        return None

    with ThreadPoolExecutor(cores.USABLE) as pool:
        outcomes = pool.map(why, range(len(dataset.labels)))
        found = {index: reason for index, reason in enumerate(outcomes) if reason is not None}
    _remember(cache, found)
    return found

"""A data set, and its splits: the images that a run trains, validates and tests on."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.errors import UserError
from .contents import Contents, contents_of, stamps_of
from .options import Counts, DatasetConfig, SplitConfig

RECORDED = 1000  # names of files in a record


@dataclass(frozen=True)
class Pairs:
    """Pairs of test images, in folds. The images of a pair show one class or two."""

    first: np.ndarray  # (P,) int64, indices into the Dataset
    second: np.ndarray
    same: np.ndarray  # (P,) bool
    fold: np.ndarray  # (P,) int64


@dataclass(frozen=True)
class Dataset:
    """A labelled image collection with its official split. `load(i)` decodes image i to an RGB PIL image."""

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray  # (N,) int64, 0..K-1; -1 for images of pairs, whose classes are not trained on
    is_test: np.ndarray  # (N,) bool
    names: tuple[str, ...]  # (N,) stable identifiers, e.g. relative file names
    load: Callable[[int], Image.Image]
    listing: str  # sha256 hex over names, labels, split and file sizes, or over what decides the pixels without files
    files: tuple[Path, ...] = ()  # (N,), or none if the images are not files
    cache_dir: Path | None = None  # folder that remembers the digests of files
    pairs: Pairs | None = None  # the pairs that a verification is tested on
    remarks: tuple[str, ...] = ()  # sentences about how the files were understood, and what is left out
    left_out: Mapping[str, str] = field(default_factory=dict)  # file: why
    is_val: np.ndarray | None = None  # (N,) bool, where the data set has a validation split of its own

    def class_of(self, index: int) -> str:
        """The class of image `index`, or the image's name if its class is not trained on."""
        label = self.labels[index]
        return self.classes[label] if label >= 0 else self.names[index]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex over the bytes of all images, labels and split. It does not depend on where the files lie.

        Reads the files that changed. Raises UserError that names those that cannot be read.
        """
        if not self.files:
            return self.listing
        return hashlib.sha256(self.listing.encode() + self._contents.digests.tobytes()).hexdigest()

    @cached_property
    def _contents(self) -> Contents:
        return contents_of(self.name, self.files, self.cache_dir)

    def without(self, dropped: Mapping[int, str]) -> "Dataset":
        """The data set without the images `dropped`, {index: reason}. The indices of the others change."""
        kept = np.setdiff1d(np.arange(len(self.labels)), [*dropped])
        names = [self.names[index] for index in dropped]
        return replace(
            self,
            labels=self.labels[kept],
            is_test=self.is_test[kept],
            names=tuple(self.names[index] for index in kept),
            files=tuple(self.files[index] for index in kept),
            load=lambda index: self.load(int(kept[index])),
            listing=hashlib.sha256("\n".join([self.listing, *names]).encode(errors="surrogateescape")).hexdigest(),
            left_out={**dict(zip(names, dropped.values(), strict=True)), **self.left_out},
        )

    def left_out_in_record(self) -> dict[str, Any]:
        """Entries of a run's record: the number of files that were left out, and the names of the first RECORDED."""
        return {"count": len(self.left_out), "files": dict(list(self.left_out.items())[:RECORDED])}

    def copies(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Pairs of images whose files have the same bytes: of two classes; and of the test and the training split."""
        first: dict[bytes, int] = {}
        same: dict[int, list[int]] = {}
        if self.files and self.pairs is None:
            for index, digest in enumerate(map(bytes, self._contents.digests)):
                if (other := first.setdefault(digest, index)) != index:
                    same.setdefault(other, [other]).append(index)
        classes, splits = [], []
        for one, members in same.items():
            classes += [(self.names[one], self.names[i]) for i in members if self.labels[i] != self.labels[one]]
            train = next((i for i in members if not self.is_test[i]), None)
            if train is not None:
                splits += [(self.names[i], self.names[train]) for i in members if self.is_test[i]]
        return classes, splits

    def in_train_of(self, other: "Dataset") -> list[str]:
        """Names of images whose files have the bytes of a training image of `other`."""
        if not (self.files and other.files):
            return []
        trained = set(map(bytes, other._contents.digests[~other.is_test]))
        return [
            n for n, digest in zip(self.names, map(bytes, self._contents.digests), strict=True) if digest in trained
        ]

    def of_several_pictures(self) -> list[str]:
        """Names of images whose files hold several pictures, of which the first is read."""
        return [self.names[index] for index in np.flatnonzero(self._contents.several).tolist()] if self.files else []

    def changed_files(self) -> list[str]:
        """Names of images whose files changed, or went, since `fingerprint` was computed."""
        if not self.files:
            return []
        changed = (stamps_of(self.files) != self._contents.stamps).any(axis=1)
        return [self.names[index] for index in np.flatnonzero(changed).tolist()]


@dataclass(frozen=True)
class Splits:
    """Indices into a Dataset, ascending."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray

    @property
    def for_training(self) -> int:
        """Number of training and validation images."""
        return len(self.train) + len(self.val)

    def fingerprint(self, dataset: Dataset) -> str:
        """sha256 hex over the data set and over the indices of each split."""
        digest = hashlib.sha256(dataset.fingerprint.encode())
        for indices in (self.train, self.val, self.test):
            digest.update(np.ascontiguousarray(indices, dtype=np.int64).tobytes() + b"|")
        return digest.hexdigest()


def counts_of(dataset: Dataset) -> Counts:
    """Numbers of classes, training and test images."""
    n_test = int(dataset.is_test.sum())
    return Counts(len(dataset.classes), len(dataset.labels) - n_test, n_test)


def expected_counts(config: DatasetConfig) -> Counts | None:
    """The official counts; None if there are none, or if the options ask for a draw that is not the published one."""
    return config.official if config.as_published else None


def make_splits(dataset: Dataset, draw: DatasetConfig, split: SplitConfig, seed: int = 0) -> Splits:
    """Draws training images as `draw` says, then holds out the validation split, both class by class.

    The test split is the data set's own. Some data sets have a validation split of their own, too. seed: the run's,
    which draw.redraw uses. Raises UserError for a class without training images, or with too few for the draw or the
    split.
    """
    if dataset.is_val is not None:
        if split.folds or split.val_fraction:
            raise UserError(
                f"{dataset.name} has a validation split of its own: leave out split.folds and split.val_fraction."
            )
        own = (~(dataset.is_val | dataset.is_test), dataset.is_val, dataset.is_test)
        return Splits(*map(np.flatnonzero, own))
    train, val = [], []
    of_run = (5, seed) if draw.redraw else ()
    for label, name in enumerate(dataset.classes):
        members = np.flatnonzero((dataset.labels == label) & ~dataset.is_test)
        if len(members) == 0:
            raise UserError(f"Class {name} of {dataset.name} has no training image.")
        wanted = draw.images_per_class or int(np.ceil(draw.sample_rate * len(members) - 1e-9))
        if wanted > len(members):
            raise UserError(
                f"dataset.images_per_class={wanted}, but class {name} of {dataset.name} "
                f"has {len(members)} training images."
            )
        drawn = np.random.default_rng((draw.subset_seed, label, *of_run)).permutation(members)[:wanted]
        # The split has a generator of its own, so that the draw does not depend on it.
        drawn = np.random.default_rng((split.seed, 1, label)).permutation(drawn)
        held_out = _held_out(len(drawn), split)
        if held_out.all() or (not held_out.any() and (split.val_fraction or split.folds)):
            raise UserError(
                f"Class {name} of {dataset.name} has {len(drawn)} training images: too few for this validation split."
            )
        train.append(drawn[~held_out])
        val.append(drawn[held_out])
    test = np.flatnonzero(dataset.is_test)
    if len(test) == 0:
        raise UserError(f"{dataset.name} has no test image.")
    return Splits(np.sort(np.concatenate(train)), np.sort(np.concatenate(val)), test)


def _held_out(n: int, split: SplitConfig) -> np.ndarray:
    """(n,) bool: which of the n shuffled images of one class are held out."""
    position = np.arange(n)
    if split.folds is not None:
        return position % split.folds == split.fold
    return position < round(split.val_fraction * n)

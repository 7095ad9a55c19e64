"""The options of every data set, and of the validation split. A reader with options of its own extends them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..common.console import quoted
from ..common.options import LONGEST, MISSING, Options, option


@dataclass(frozen=True)
class Publication:
    """What a publisher provides, and where a person gets it."""

    title: str
    needs: tuple[str, ...] = ()  # files and folders below dataset.root in the publisher's layout
    source: str = ""  # where to get it
    archives: tuple[str, ...] = ()  # the publisher's archives, which delta-data prepare unpacks
    download: Callable[[Path], None] | None = None  # torchvision's download into dataset.root


@dataclass
class Counts(Options):
    """Counts of a whole data set, before any draw of training images, or as its publisher gives them."""

    key: ClassVar[str] = "dataset.official"

    classes: int = option(MISSING, "number of classes", at_least=0)
    train: int = option(MISSING, "number of training images", at_least=0)
    test: int = option(MISSING, "number of test images", at_least=0)

    def against(self, official: "Counts | None") -> str:
        """ready | subset | more than official"""
        pairs = zip(vars(self).values(), vars(official or self).values(), strict=True)
        differences = [found - expected for found, expected in pairs]
        if max(differences) > 0:
            return "more than official"
        return "subset" if min(differences) < 0 else "ready"


@dataclass
class DatasetConfig(Options):
    key: ClassVar[str] = "dataset"
    task: ClassVar[str] = "classification"  # what such data sets are for
    own_validation: ClassVar[bool] = False  # they have a validation split of their own

    reader: str = option(
        MISSING, "how the files are read: lists, folder, glyphs, or a reader for one publisher's format"
    )
    name: str = option(
        MISSING, "name of the data set in runs and reports; in dataset=folder, `folder` stands for its folder's name"
    )
    root: str | None = option(None, "folder that holds the publisher's files")
    download: bool = option(False, "let torchvision fetch the files first, where it can", identity=False)
    official: Counts | None = option(None, "what the publisher says the data set holds", identity=False)
    images_per_class: int | None = option(
        None, "training images drawn from each class; null means all of them", at_least=1
    )
    sample_rate: float = option(1.0, "fraction of each class's training images to draw, rounded up", above=0, at_most=1)
    subset_seed: int = option(
        0, "seed of every draw of images; it does not depend on `seed`, so that all seeds share the images", at_least=0
    )
    redraw: bool = option(False, "let each `seed` draw training images of its own; the test images stay the same")
    mirror: bool = option(True, "mirror training images at random")
    unreadable: str = option(
        "refuse",
        "image files that cannot be read: refuse to run, or skip (leave them out and name them)",
        choices=("refuse", "skip"),
        identity=False,
    )
    scale: Any = option(
        None,
        "scale of pixels of more than 8 bits: full (white is 65535, or 1.0 for floating-point numbers), minmax (black "
        "and white are each image's smallest and largest value), or the value that is white, such as 4095",
    )
    max_pixels: int | None = option(
        None, "largest number of pixels of an image file; null: 178,956,970", at_least=1, identity=False
    )

    @property
    def as_published(self) -> bool:
        """Whether `official` applies: not if another draw than the published one is read."""
        return True

    def publication(self, of_reader: Publication) -> Publication:
        """What the publisher provides. of_reader: the reader's description."""
        return of_reader

    @property
    def identity_name(self) -> str:
        """The data set's name in the identity of a run."""
        return self.name

    def check(self) -> None:
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool) and 0 < self.scale < 3e38
        self.require(
            self.scale in (None, "full", "minmax") or number,
            "scale",
            f"dataset.scale must be full, minmax or a number above 0 (the value that is white), got {self.scale!r}.",
        )
        self.require(
            self.images_per_class is None or self.sample_rate == 1,
            "images_per_class",
            "dataset.images_per_class and dataset.sample_rate both limit the training images: set one of them.",
        )
        self.require(
            self.name == MISSING or re.fullmatch(r"\w[\w.-]*", self.name) is not None,
            "name",
            f"dataset.name={self.name!r} becomes part of file names: use letters, digits, _, - and . only.",
        )


@dataclass
class EmbeddedConfig(DatasetConfig):
    """A data set that comes with the package."""

    def check(self) -> None:
        super().check()
        self.require(
            self.root is None,
            "root",
            f"dataset.root={self.root}: {self.name} is embedded and has no folder. For images of your own: "
            f"dataset=folder {quoted(f'dataset.root={self.root}')}",
        )


@dataclass
class PairsConfig(DatasetConfig):
    """A data set for task=verification: classes to train on, and pairs of images of other classes to test on."""

    task: ClassVar[str] = "verification"


@dataclass
class SplitConfig(Options):
    """The validation split, which is cut from the (drawn) training images class by class, never from the test images.

    Runs on folds exist to choose settings: they do not look at the test images at all.
    """

    key: ClassVar[str] = "split"

    val_fraction: float = option(0.0, "fraction of the training images that is held out", at_least=0, below=1)
    folds: int | None = option(
        None, "number of folds of a cross-validation, instead of a fraction", at_least=2, at_most=LONGEST
    )
    fold: int = option(0, "the fold that is held out: 0 .. folds-1", at_least=0)
    seed: int = option(0, "seed of the split", at_least=0)

    def check(self) -> None:
        if self.folds is None:
            self.require(self.fold == 0, "fold", f"split.fold={self.fold} needs split.folds, the number of folds.")
            return
        self.require(
            self.val_fraction == 0, "folds", "split.folds and split.val_fraction both make a validation split: set one."
        )
        self.require(self.fold < self.folds, "fold", f"split.fold must be in 0..{self.folds - 1}, got {self.fold}.")

    @property
    def measures_test(self) -> bool:
        return self.folds is None


@dataclass
class EvaluateConfig(Options):
    """Measurements after training. They do not change the run."""

    key: ClassVar[str] = "evaluate"

    forgetting: bool = option(False, "measure how much of the source's knowledge the network keeps", identity=False)
    # Its name or folder on the command line, which cli/ resolves to a DatasetConfig.
    probe: Any = option(None, "another data set, or a folder, for a linear probe of the embeddings", identity=False)
    source_labels: bool = option(
        False, "the classes of evaluate.probe are those of the source network's head, in its order", identity=False
    )
    also: dict[str, str] = option(
        {},
        "further test sets with the run's classes: +evaluate.also.NAME=FOLDER adds one",
        identity=False,
    )

    def check(self) -> None:
        needed = {"probe": self.probe is not None, "source_labels": self.source_labels}
        for name, given in needed.items():
            self.require(self.forgetting or not given, name, f"evaluate.{name} belongs to evaluate.forgetting=true.")
        self.require(
            self.probe is not None or not self.source_labels, "source_labels", "evaluate.source_labels needs a probe."
        )
        for name in self.also:
            self.require(name.isidentifier(), "also", f"evaluate.also: {name!r} is not a name: use letters, digits, _.")

    @property
    def asked(self) -> bool:
        return self != EvaluateConfig()

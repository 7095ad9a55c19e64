"""Caltech-256 and Caltech-101 in their publishers' layouts. Neither has an official split: images are drawn."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.console import shorten_list
from ...common.errors import UserError
from ...common.options import MISSING, option
from ..dataset import Dataset
from ..files import from_files
from ..options import DatasetConfig
from ..registry import reader
from .torchvision_sets import downloader

# With numbering=fixed, training images have numbers up to this one, and test images have higher numbers.
FIXED_TRAIN = 60


@dataclass
class DrawnConfig(DatasetConfig):
    """A data set without an official split: a number of images of each class, drawn with `subset_seed`."""

    train_per_class: int = option(MISSING, "training images drawn from each class", at_least=1)
    test_per_class: int | None = option(None, "test images drawn from each class; null means all others", at_least=1)
    clutter: bool = option(False, "read the background class, too")
    numbering: str = option(
        "random",
        "which images are drawn: random ones, or fixed numbers (1..N train, 61..80 test), as in the code of L2-SP",
        choices=("random", "fixed"),
    )

    @property
    def as_published(self) -> bool:
        return self.official is not None and self.train_per_class * self.official.classes == self.official.train


Draw = tuple[list[int], list[int]]  # numbers of the training and of the test images of one class


@dataclass(frozen=True)
class Layout:
    title: str
    folder: str  # below dataset.root, one folder per class in it
    class_name: str  # pattern of a class folder
    file_name: str  # pattern of an image; its group is the image's number in the class
    clutter: str  # the background class


CALTECH256 = Layout("Caltech-256", "256_ObjectCategories", r"\d{3}\..+", r"\d{3}_(\d{4})\.jpg", "257.clutter")
CALTECH101 = Layout(
    "Caltech-101", "caltech101/101_ObjectCategories", r"[^.].*", r"image_(\d{4})\.jpg", "BACKGROUND_Google"
)


def download_caltech256(root: Path) -> None:
    """torchvision's download. Raises UserError where it would not put the files into `root`."""
    if root.name != "caltech256":
        raise UserError(
            f"torchvision puts Caltech-256 into a folder called caltech256, but dataset.root is {root}: pass "
            "dataset.root=DIR/caltech256."
        )
    from torchvision.datasets import Caltech256  # slow to import

    Caltech256(root.parent, download=True)


@reader(
    "caltech256",
    title="Caltech-256",
    options=DrawnConfig,
    needs=("256_ObjectCategories",),
    source="256_ObjectCategories.tar (1.2 GB) from https://data.caltech.edu/records/nyy15-4j048",
    archives=("256_ObjectCategories.tar",),
    download=download_caltech256,
)
def caltech256(root: Path, config: DrawnConfig) -> Dataset:
    """Draws from 256_ObjectCategories/<NNN.class>/<NNN_NNNN.jpg>; see `_drawn`."""
    return _drawn(CALTECH256, root, config)


@reader(
    "caltech101",
    title="Caltech-101",
    options=DrawnConfig,
    needs=("caltech101/101_ObjectCategories",),
    source="caltech-101.zip from https://data.caltech.edu/records/mzrjq-6wc02 (101_ObjectCategories in a folder "
    "caltech101)",
    download=downloader("Caltech101"),
)
def caltech101(root: Path, config: DrawnConfig) -> Dataset:
    """Draws from caltech101/101_ObjectCategories/<class>/<image_NNNN.jpg>; see `_drawn`."""
    if config.numbering == "fixed":
        raise UserError(
            "dataset.numbering=fixed is a rule for Caltech-256; many classes of Caltech-101 have fewer images than it "
            "needs. Leave it at random."
        )
    return _drawn(CALTECH101, root, config)


def _drawn(layout: Layout, root: Path, config: DrawnConfig) -> Dataset:
    """A Dataset of `train_per_class` training and `test_per_class` test images of each class, and of no other image.

    Files with other names are not images of the class: Caltech-256 has 198.spider/RENAME2 and 056.dog/greg/.
    Raises UserError for a class with too few images and for a background class that is wanted but not there.
    """
    folder = root / layout.folder
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    classes = [name for name in found if re.fullmatch(layout.class_name, name) and name != layout.clutter]
    if not classes:
        raise UserError(f"{folder} holds no class folder of {layout.title}.")
    if config.clutter:
        if layout.clutter not in found:
            raise UserError(f"dataset.clutter=true, but {folder} has no background class {layout.clutter}.")
        # It comes last, so that the other classes have the same labels, and with them the same draws, without it.
        classes.append(layout.clutter)

    draw = _draw_by_number if config.numbering == "fixed" else _draw_at_random
    files, labels, is_test = [], [], []
    for label, name in enumerate(classes):
        images = {}
        for file in sorted(path.name for path in (folder / name).iterdir()):
            if match := re.fullmatch(layout.file_name, file):
                images[int(match[1])] = file
        train, test = draw(f"Class {name} of {layout.title}", images, label, config)
        for number in sorted(train + test):
            files.append(f"{name}/{images[number]}")
            labels.append(label)
            is_test.append(number in test)
    return from_files(config.name, folder, classes, files, labels, is_test, listed_in=f"the draw from {layout.folder}")


def _draw_at_random(title: str, images: dict[int, str], label: int, config: DrawnConfig) -> Draw:
    """Draws the test images first, so that draws of 30 and of 60 training images share them; the 30 are among the 60.

    Draws the training images first if all other images are test images.
    """
    n_train, n_test = config.train_per_class, config.test_per_class
    needed = n_train + (n_test or 1)
    if len(images) < needed:
        raise UserError(
            f"{title} has {len(images)} images, but dataset.train_per_class={n_train} and "
            f"dataset.test_per_class={'null' if n_test is None else n_test} need at least {needed}."
        )
    drawn = np.random.default_rng((config.subset_seed, 3, label)).permutation(sorted(images)).tolist()
    if n_test is None:
        return drawn[:n_train], drawn[n_train:]
    return drawn[n_test:needed], drawn[:n_test]


def _draw_by_number(title: str, images: dict[int, str], label: int, config: DrawnConfig) -> Draw:
    """The rule of the L2-SP authors' code: images 1..30 (or 1..60) are for training, 61..80 for the test."""
    n_train, n_test = config.train_per_class, config.test_per_class
    if n_train > FIXED_TRAIN:
        raise UserError(
            f"dataset.numbering=fixed trains on at most {FIXED_TRAIN} images of each class, but "
            f"dataset.train_per_class={n_train}."
        )
    last = max(images, default=0) if n_test is None else FIXED_TRAIN + n_test
    last = max(last, FIXED_TRAIN + 1)  # at least one test image
    train, test = list(range(1, n_train + 1)), list(range(FIXED_TRAIN + 1, last + 1))
    absent = [str(number) for number in train + test if number not in images]
    if absent:
        raise UserError(
            f"{title} has {len(images)} images, but dataset.numbering=fixed needs its images 1..{n_train} and "
            f"{FIXED_TRAIN + 1}..{last}: it lacks {shorten_list(absent)}."
        )
    return train, test

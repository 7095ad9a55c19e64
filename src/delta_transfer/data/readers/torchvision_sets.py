"""Data sets whose odd formats torchvision reads. It reads the lists, and `read_image` reads the images.

`root` is torchvision's: the folder that contains stanford_cars/, cifar-10-batches-py/ and so on. Official validation
images count as training images. Functions import torchvision, since it imports torch, which takes seconds.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from ...common.console import shorten_list
from ...common.errors import UserError
from ..dataset import Dataset
from ..files import from_arrays, from_files
from ..options import DatasetConfig
from ..registry import reader


@cache  # equal for equal names: a sweep fetches once
def downloader(class_name: str) -> Callable[[Path], None]:
    """A function (root) with which torchvision fetches missing files. It raises what torchvision raises."""

    def download(root: Path) -> None:
        from torchvision import datasets

        getattr(datasets, class_name)(root, download=True)

    return download


@reader(
    "pets",
    title="Oxford-IIIT Pets",
    needs=("oxford-iiit-pet/annotations", "oxford-iiit-pet/images"),
    source="images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/",
    download=downloader("OxfordIIITPet"),
)
def pets(root: Path, config: DatasetConfig) -> Dataset:
    return _from_lists(
        "OxfordIIITPet", config.name, root / "oxford-iiit-pet", ["trainval"], "trainval.txt and test.txt"
    )


@reader(
    "cars",
    title="Stanford Cars",
    needs=(
        "stanford_cars/devkit/cars_train_annos.mat",
        "stanford_cars/cars_test_annos_withlabels.mat",
        "stanford_cars/cars_train",
        "stanford_cars/cars_test",
    ),
    source="cars_train.tgz, cars_test.tgz, car_devkit.tgz and cars_test_annos_withlabels.mat from a mirror "
    "(ai.stanford.edu no longer serves them) into a folder stanford_cars",
    archives=("stanford_cars/cars_train.tgz", "stanford_cars/cars_test.tgz", "stanford_cars/car_devkit.tgz"),
)
def cars(root: Path, config: DatasetConfig) -> Dataset:
    listed_in = "cars_train_annos.mat and cars_test_annos_withlabels.mat"
    return _from_lists("StanfordCars", config.name, root / "stanford_cars", ["train"], listed_in)


@reader(
    "flowers102",
    title="Flowers-102",
    needs=("flowers-102/imagelabels.mat", "flowers-102/setid.mat", "flowers-102/jpg"),
    source="102flowers.tgz, imagelabels.mat and setid.mat from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    download=downloader("Flowers102"),
)
def flowers102(root: Path, config: DatasetConfig) -> Dataset:
    return _from_lists("Flowers102", config.name, root / "flowers-102", ["train", "val"], "setid.mat")


@reader(
    "cifar10",
    title="CIFAR-10",
    needs=("cifar-10-batches-py/batches.meta", "cifar-10-batches-py/test_batch"),
    source="cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    download=downloader("CIFAR10"),
)
def cifar10(root: Path, config: DatasetConfig) -> Dataset:
    return _cifar("CIFAR10", config.name, root)


@reader(
    "cifar100",
    title="CIFAR-100",
    needs=("cifar-100-python/meta", "cifar-100-python/test"),
    source="cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
    download=downloader("CIFAR100"),
)
def cifar100(root: Path, config: DatasetConfig) -> Dataset:
    return _cifar("CIFAR100", config.name, root)


@reader(
    "stl10",
    title="STL-10",
    needs=("stl10_binary/class_names.txt", "stl10_binary/train_X.bin", "stl10_binary/test_X.bin"),
    source="stl10_binary.tar.gz (2.6 GB) from https://cs.stanford.edu/~acoates/stl10/",
    download=downloader("STL10"),
)
def stl10(root: Path, config: DatasetConfig) -> Dataset:
    from torchvision.datasets import STL10

    class Labelled(STL10):
        # Without the last entry, the unlabelled images: 2.8 GB that would be needed, and checksummed at every start.
        train_list = STL10.train_list[:2]

    with _reading(config.name, root):
        train, test = Labelled(root, split="train"), Labelled(root, split="test")
        images = np.concatenate([train.data, test.data]).transpose(0, 2, 3, 1)
        labels = np.concatenate([train.labels, test.labels])
    return from_arrays(config.name, train.classes, images, labels, n_train=len(train))


def _cifar(class_name: str, name: str, root: Path) -> Dataset:
    """The lists are pickles, which can run code. torchvision compares their checksums before it reads them."""
    from torchvision import datasets

    with _reading(name, root):
        train, test = (getattr(datasets, class_name)(root, train=train) for train in (True, False))
    images = np.concatenate([train.data, test.data])
    return from_arrays(name, train.classes, images, train.targets + test.targets, n_train=len(train))


def _from_lists(class_name: str, name: str, folder: Path, train: list[str], listed_in: str) -> Dataset:
    """The Dataset of the images below `folder` that torchvision's class names in its splits `train` and "test".

    Raises UserError for lists that cannot be read or whose classes differ.
    """
    from torchvision import datasets

    data_set = getattr(datasets, class_name)
    files: list[str] = []
    labels: list[int] = []
    is_test: list[bool] = []
    classes: list[str] = []
    for split in (*train, "test"):
        with _reading(name, folder.parent):
            if class_name == "OxfordIIITPet":  # indexing it decodes images; only these attributes have the paths
                listed = data_set(folder.parent, split=split)
                pairs = list(zip(listed._images, listed._labels, strict=True))
            else:
                listed = data_set(folder.parent, split=split, loader=lambda path: path)
                pairs = [listed[i] for i in range(len(listed))]
            files += [Path(path).relative_to(folder).as_posix() for path, _ in pairs]
            labels += [int(label) for _, label in pairs]
            is_test += [split == "test"] * len(pairs)
            found = [str(c) for c in listed.classes]
        classes = classes or found
        if found != classes:
            differing = sorted(set(found) ^ set(classes)) or found
            raise UserError(f"The lists of {name} in {folder} do not agree on the classes: {shorten_list(differing)}.")
    return from_files(name, folder, classes, files, labels, is_test, listed_in)


@contextmanager
def _reading(name: str, root: Path) -> Iterator[None]:
    """Turns all errors of torchvision into a UserError: on damaged lists, parsers can raise nearly anything."""
    try:
        yield
    except Exception as error:
        why = reason(error)
        if "not found or corrupted" in why:
            why = (
                "torchvision compares checksums, and a file is not there or differs from the publisher's; "
                "dataset.download=true fetches it again"
            )
        raise UserError(f"{name} in {root} cannot be read: {why}.") from error


def reason(error: Exception) -> str:
    """Kind and first line of an error, without a full stop."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"

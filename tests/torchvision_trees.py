"""Miniature trees of the data sets that torchvision reads, in their publishers' layouts.

Every image of the sets of files has a colour of its own; grey and CMYK files are among them.
"""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image
from scipy.io import savemat


@dataclass
class Tree:
    """What a reader must find: images in order, training images first."""

    root: Path  # what dataset.root is set to
    folder: str  # the data set's own folder below it
    classes: list[str]
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    is_test: list[bool] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)  # (H, W, 3)

    def add(self, name: str, label: int, test: bool) -> None:
        """Expect the file `name` of the data set's folder, and write it."""
        pixels = write_jpeg(self.root / self.folder / name, len(self.names))
        self.expect(name, label, test, pixels)

    def expect(self, name: str, label: int, test: bool, pixels: np.ndarray) -> None:
        self.names.append(name)
        self.labels.append(label)
        self.is_test.append(test)
        self.pixels.append(pixels)

    def write(self, name: str, *lines: str) -> None:
        path = self.root / self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))


def write_jpeg(path: Path, number: int) -> np.ndarray:
    """An RGB, grey or CMYK image of 12 x 10 pixels; returns how it looks in RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (40 + 53 * number % 170, 40 + 97 * number % 170, 40 + 31 * number % 170)
    image = Image.new("RGB", (12, 10), colour).convert(("RGB", "L", "CMYK")[number % 3])
    image.save(path, quality=95)
    return np.asarray(image.convert("RGB"))


def write_food101(root: Path) -> Tree:
    tree = Tree(root, "food-101", ["apple_pie", "pizza"])
    # The publisher's keys are sorted; nothing here depends on it.
    for split, numbers in (("train", (101, 102, 103)), ("test", (201, 202))):
        listed = {name: [f"{name}/{number}" for number in numbers] for name in ("pizza", "apple_pie")}
        tree.write(f"meta/{split}.json", json.dumps(listed))
        tree.write(f"meta/{split}.txt", *(file for files in listed.values() for file in files))
        for name, files in listed.items():
            for file in files:
                tree.add(f"images/{file}.jpg", tree.classes.index(name), split == "test")
    tree.write("meta/classes.txt", *tree.classes)
    tree.write("meta/labels.txt", "Apple pie", "Pizza")
    return tree


def write_dtd(root: Path) -> Tree:
    """The Tree of the first partition; the second one swaps its training and test images."""
    tree = Tree(root, "dtd", ["banded", "zigzagged"])
    parts = {"train": (1, 2), "val": (3,), "test": (4, 5)}
    for split, numbers in parts.items():
        files = [f"{name}/{name}_{number:04d}.jpg" for name in tree.classes for number in numbers]
        tree.write(f"dtd/labels/{split}1.txt", *files)
        tree.write(f"dtd/labels/{ {'train': 'test', 'test': 'train'}.get(split, split) }2.txt", *files)
        for file in files:
            tree.add(f"dtd/images/{file}", tree.classes.index(file.split("/")[0]), split == "test")
    return tree


def write_aircraft(root: Path) -> Tree:
    tree = Tree(root, "fgvc-aircraft-2013b", ["Cessna 172", "707-320", "F/A-18"])
    tree.write("data/variants.txt", *tree.classes)
    for split, numbers in (("trainval", (1, 2, 3, 4)), ("test", (11, 12, 13))):
        labelled = [(f"{number:07d}", number % 3) for number in numbers]
        tree.write(f"data/images_variant_{split}.txt", *(f"{image} {tree.classes[label]}" for image, label in labelled))
        for image, label in labelled:
            tree.add(f"data/images/{image}.jpg", label, split == "test")
    return tree


def write_pets(root: Path) -> Tree:
    tree = Tree(root, "oxford-iiit-pet", ["Abyssinian", "Great Pyrenees", "Yorkshire Terrier"])
    breeds = [("Abyssinian", 1), ("great_pyrenees", 2), ("yorkshire_terrier", 2)]
    for split, numbers in (("trainval", (1, 10)), ("test", (20, 3))):
        lines = []
        for label, (breed, species) in enumerate(breeds):
            for number in numbers:
                lines.append(f"{breed}_{number} {label + 1} {species} {label or 1}")
                tree.add(f"images/{breed}_{number}.jpg", label, split == "test")
        tree.write(f"annotations/{split}.txt", *lines)
    return tree


def write_cars(root: Path) -> Tree:
    tree = Tree(root, "stanford_cars", ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi S4 Sedan 2007"])
    for split, labels in (("train", (2, 0, 1, 2)), ("test", (1, 1, 2))):
        files = [(f"{number:05d}.jpg", label) for number, label in enumerate(labels, start=1)]
        for file, label in files:
            tree.add(f"cars_{split}/{file}", label, split == "test")
        list_name = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        save_annotations(root / "stanford_cars" / list_name, files)
    names = np.empty((1, 3), dtype=object)
    names[0, :] = tree.classes
    savemat(root / "stanford_cars/devkit/cars_meta.mat", {"class_names": names})
    return tree


def save_annotations(path: Path, files: list[tuple[str, int]]) -> None:
    """The struct array of the cars' devkit; classes of it are 1-based."""
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    annotations = np.empty((1, len(files)), dtype=fields)
    for i, (file, label) in enumerate(files):
        annotations[0, i] = (np.uint8(1), np.uint8(1), np.uint8(9), np.uint8(9), np.uint8(label + 1), file)
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"annotations": annotations})


def write_flowers102(root: Path) -> Tree:
    """Three of the 102 species: 1, 2 and 102."""
    tree = Tree(root, "flowers-102", list(torchvision.datasets.Flowers102.classes))
    labels = [0, 101, 1, 0, 101, 1, 0, 1, 101]  # of images 1, 2, ...
    splits = {"trnid": [6, 1, 5], "valid": [9, 7, 3], "tstid": [2, 8, 4]}
    for key, numbers in splits.items():
        for number in numbers:
            tree.add(f"jpg/image_{number:05d}.jpg", labels[number - 1], key == "tstid")
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8) + np.uint8(1)})
    savemat(root / "flowers-102/setid.mat", {key: np.array([ids], dtype=np.uint16) for key, ids in splits.items()})
    return tree


def write_cifar10(root: Path) -> Tree:
    tree = Tree(root, "cifar-10-batches-py", ["airplane", "automobile", "bird"])
    for number in range(1, 6):
        _write_batch(tree, f"data_batch_{number}", "labels", [number % 3, (number + 1) % 3], test=False)
    _write_batch(tree, "test_batch", "labels", [2, 1, 0], test=True)
    _write_pickle(tree, "batches.meta", {"label_names": tree.classes, "num_cases_per_batch": 2, "num_vis": 3072})
    return tree


def write_cifar100(root: Path) -> Tree:
    tree = Tree(root, "cifar-100-python", ["apple", "aquarium_fish", "baby"])
    _write_batch(tree, "train", "fine_labels", [2, 0, 1, 1], test=False)
    _write_batch(tree, "test", "fine_labels", [1, 0], test=True)
    _write_pickle(tree, "meta", {"fine_label_names": tree.classes, "coarse_label_names": ["fish", "fruit"]})
    return tree


def _write_batch(tree: Tree, name: str, key: str, labels: list[int], test: bool) -> None:
    """Rows of 3,072 values: the red, the green and the blue plane of an image, each row by row."""
    images = _random_images(tree, labels, test, side=32)
    content = {"data": images.transpose(0, 3, 1, 2).reshape(len(labels), -1), key: labels}
    if key == "fine_labels":
        content["coarse_labels"] = [0] * len(labels)
    _write_pickle(tree, name, content)


def _write_pickle(tree: Tree, name: str, content: dict) -> None:
    folder = tree.root / tree.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_stl10(root: Path) -> Tree:
    """Without unlabeled_X.bin. The planes of an image are written column by column; labels are 1-based."""
    tree = Tree(root, "stl10_binary", ["airplane", "bird", "car"])
    tree.write("class_names.txt", *tree.classes)
    for split, labels in (("train", [2, 0, 1, 0]), ("test", [1, 2, 0])):
        images = _random_images(tree, labels, split == "test", side=96)
        (root / "stl10_binary" / f"{split}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        (root / "stl10_binary" / f"{split}_y.bin").write_bytes(bytes(label + 1 for label in labels))
    return tree


def _random_images(tree: Tree, labels: list[int], test: bool, side: int) -> np.ndarray:
    """(N, side, side, 3), expected in `tree`."""
    images = np.random.default_rng(len(tree.names)).integers(0, 256, (len(labels), side, side, 3), dtype=np.uint8)
    for label, image in zip(labels, images, strict=True):
        number = tree.is_test.count(test)
        tree.expect(f"{'test' if test else 'train'}/{number:05d}", label, test, image)
    return images


# dataset.name -> writer
WRITERS: dict[str, Callable[[Path], Tree]] = {
    "food101": write_food101,
    "dtd": write_dtd,
    "aircraft": write_aircraft,
    "pets": write_pets,
    "cars": write_cars,
    "flowers102": write_flowers102,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "stl10": write_stl10,
}
ARRAYS = ("cifar10", "cifar100", "stl10")


def accept_checksums(monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    """Makes torchvision expect the checksums that the files of `tree` have now."""

    def md5(name: str) -> str:
        path = tree.root / tree.folder / name
        return hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else "0" * 32

    sets = torchvision.datasets
    for data_set in (sets.CIFAR10, sets.CIFAR100, sets.STL10):
        if data_set.base_folder == tree.folder:
            for part in ("train_list", "test_list"):
                monkeypatch.setattr(data_set, part, [[name, md5(name)] for name, _ in getattr(data_set, part)])
            if data_set is not sets.STL10:
                monkeypatch.setattr(data_set, "meta", {**data_set.meta, "md5": md5(data_set.meta["filename"])})
    if tree.folder == "flowers-102":
        table = {key: (name, md5(name)) for key, (name, _) in sets.Flowers102._file_dict.items()}
        monkeypatch.setattr(sets.Flowers102, "_file_dict", table)

"""Miniature data sets in their publishers' layouts, with the oddities of the real archives.

Each `write_<name>(root, ...)` returns what dataset.root should be.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def write_image(path: Path, number: int = 0, mode: str = "RGB") -> None:
    """A few pixels of noise around a colour that `number` decides."""
    pixels = np.random.default_rng(number).normal(90, 20, size=(10, 12, 3)) + 80 * np.eye(3)[number % 3]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(path)


def write_mit67(root: Path, train: int = 4, test: int = 2) -> Path:
    """Lists with Windows line ends, spaces, a backslash and no final newline; a grey and a CMYK image."""
    lists = {"TrainImages.txt": [], "TestImages.txt": []}
    for label, name in enumerate(("airport_inside", "artstudio", "auditorium")):
        for index in range(train + test):
            file = f"{name}/{name}_{index}_altavista.jpg"
            write_image(root / "Images" / file, label, "L" if index == 0 else "CMYK" if index == 1 else "RGB")
            lists["TrainImages.txt" if index < train else "TestImages.txt"].append(file)
    # In the publisher's lists the classes are in no order.
    train_lines, test_lines = lists["TrainImages.txt"][::-1], lists["TestImages.txt"]
    train_lines[0] = train_lines[0].replace("/", "\\")
    (root / "TrainImages.txt").write_bytes("  \r\n".join(train_lines).encode())
    (root / "TestImages.txt").write_bytes("\n".join(test_lines).encode())
    return root


DOGS = ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog")


def write_dogs(root: Path, train: int = 4, test: int = 2) -> Path:
    """MATLAB lists: N x 1 cell arrays of names, N x 1 labels that begin with 1; and the lists that are not needed."""
    lists = {"train_list.mat": [], "test_list.mat": []}
    for label, name in enumerate(DOGS):
        for index in range(train + test):
            file = f"{name}/{name.split('-')[0]}_{index}.jpg"
            write_image(root / "Images" / file, label)
            lists["train_list.mat" if index < train else "test_list.mat"].append((file, label + 1))
    lists["file_list.mat"] = lists["train_list.mat"] + lists["test_list.mat"]
    for name, entries in lists.items():
        write_dogs_list(root / name, entries)
    return root


def write_dogs_list(path: Path, entries: list[tuple[str, int]]) -> None:
    files = np.empty((len(entries), 1), dtype=object)
    files[:, 0] = [file for file, _ in entries]
    annotations = files.copy()
    annotations[:, 0] = [file.removesuffix(".jpg") for file, _ in entries]
    labels = np.array([[label] for _, label in entries], dtype=float)
    savemat(path, {"file_list": files, "annotation_list": annotations, "labels": labels})


def write_caltech256(root: Path, images: int = 12) -> Path:
    """With the stray file, the stray folder of images and the background class of the publisher's archive."""
    folder = root / "256_ObjectCategories"
    for name in ("056.dog", "198.spider", "257.clutter"):
        for number in range(1, images + 1):
            write_image(folder / name / f"{name[:3]}_{number:04d}.jpg", number)
    (folder / "198.spider" / "RENAME2").write_text("#!/bin/sh\n")
    write_image(folder / "056.dog" / "greg" / "056_0300.jpg")
    return root


def write_caltech101(root: Path, images: int = 12) -> Path:
    """With the background class, which sorts before the others."""
    for name in ("BACKGROUND_Google", "Faces", "accordion", "yin_yang"):
        for number in range(1, images + 1):
            write_image(root / "caltech101" / "101_ObjectCategories" / name / f"image_{number:04d}.jpg", number)
    return root


def write_stanford40(root: Path, train: int = 4, test: int = 2) -> Path:
    """Lists per action, and the lists over all actions that are not needed."""
    every = {"train": [], "test": []}
    for label, action in enumerate(("applauding", "blowing_bubbles", "phoning")):
        files = [f"{action}_{number:03d}.jpg" for number in range(1, train + test + 1)]
        for file in files:
            write_image(root / "JPEGImages" / file, label)
        for part, listed in (("train", files[test:]), ("test", files[:test])):
            every[part] += listed
            write_lines(root / "ImageSplits" / f"{action}_{part}.txt", listed, end="\r\n")
    for part, listed in every.items():
        write_lines(root / "ImageSplits" / f"{part}.txt", listed)
    write_lines(root / "ImageSplits" / "actions.txt", ["action_name\tnumber_of_images", "applauding\t6"])
    return root


def write_tiny_imagenet(root: Path, train: int = 4, test: int = 2) -> Path:
    """wnids.txt in no order, words.txt with more words than classes, boxes, validation images mixed over classes."""
    wnids = ["n02124075", "n01443537", "n04067472"]
    write_lines(root / "wnids.txt", wnids)
    names = ["entity", "goldfish, Carassius auratus", "Egyptian cat", "reel"]
    words = [f"{wnid}\t{name}" for wnid, name in zip(["n00001740", *sorted(wnids)], names, strict=True)]
    write_lines(root / "words.txt", words)
    for label, wnid in enumerate(wnids):
        for index in range(train):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", label, "L" if index == 0 else "RGB")
        write_lines(root / "train" / wnid / f"{wnid}_boxes.txt", [f"{wnid}_{i}.JPEG\t0\t0\t9\t9" for i in range(train)])
    annotations = []
    for index in range(test * len(wnids)):
        write_image(root / "val" / "images" / f"val_{index}.JPEG", index % len(wnids))
        annotations.append(f"val_{index}.JPEG\t{wnids[index % len(wnids)]}\t0\t0\t9\t9")
    write_lines(root / "val" / "val_annotations.txt", annotations)
    write_image(root / "test" / "images" / "test_0.JPEG")  # the publisher's test part has no labels
    return root


LFW_PAIRS = (
    "2\t2",
    *("Ann_Lee\t1\t2", "Bob_Ray\t3\t1", "Ann_Lee\t1\tBob_Ray\t2", "Ann_Lee\t3\tBob_Ray\t1"),
    *("Cy_Poe\t1\t3", "Di_Fox\t2\t1", "Cy_Poe\t2\tDi_Fox\t2", "Cy_Poe\t1\tDi_Fox\t3"),
)
LFW_OTHERS = {"Eve_Orr": 4, "Flo_Kay": 3, "Gus_Hay": 2, "Hal_Ives": 1}  # in no pair, and how many images they have


def write_lfw(root: Path) -> Path:
    """Pairs of four persons in two folds of 2 + 2, separated by tabs; of Ann_Lee an image that is in no pair."""
    for number, (person, count) in enumerate(
        {"Ann_Lee": 4, "Bob_Ray": 3, "Cy_Poe": 3, "Di_Fox": 3, **LFW_OTHERS}.items()
    ):
        for index in range(1, count + 1):
            write_image(root / "lfw" / person / f"{person}_{index:04d}.jpg", 10 * number + index)
    write_lines(root / "pairs.txt", list(LFW_PAIRS))
    return root


def write_folder(root: Path, **images: int) -> Path:
    """Folders with so many images each, e.g. `write_folder(root, **{"train/ants": 4, "test/ants": 2})`."""
    for name, count in images.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write_image(root / name / f"{index:03d}.jpg", index)
    return root


def write_lines(path: Path, lines: list[str], end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())

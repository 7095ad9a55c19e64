"""Readers: miniature trees in the publishers' exact layouts, with their oddities."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.io import loadmat, savemat

from delta_transfer.common.errors import UserError
from delta_transfer.data import load_dataset
from delta_transfer.data.dataset import Dataset
from delta_transfer.data.images import UNREADABLE, Reading, read_image
from delta_transfer.data.options import DatasetConfig

from . import trees
from .miniature import write_cub
from .test_config import composed


@cache  # composing takes long
def options_of(name: str) -> DatasetConfig:
    return composed(f"dataset={name}").dataset


def read(name: str, root: Path | None, *overrides: str) -> Dataset:
    """What `delta-run dataset=<name> dataset.root=<root>` reads."""
    values = (word.removeprefix("dataset.").split("=") for word in overrides)
    changes = {key: yaml.safe_load(value) for key, value in values}
    return load_dataset(options_of(name).replace(root=root and str(root), **changes))


# --- CUB-200-2011 ---


def test_cub_reads_the_official_lists(tmp_path):
    data = read("cub", write_cub(tmp_path / "CUB", classes=3, train=6, test=2))
    assert data.classes == ("001.Bird_0", "002.Bird_1", "003.Bird_2")
    assert data.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert data.is_test.tolist() == ([False] * 6 + [True] * 2) * 3
    assert data.names[0] == "001.Bird_0/001.Bird_0_0000.jpg"
    assert data.load(0).mode == "RGB"  # a grey image


def test_cub_accepts_windows_line_ends_and_spaces(tmp_path):
    root = write_cub(tmp_path / "CUB")
    expected = read("cub", root)
    for name in ("images.txt", "train_test_split.txt"):
        text = (root / name).read_text()
        (root / name).write_bytes(text.replace(" ", "  ").replace("\n", " \r\n").encode())
    again = read("cub", root)
    assert again.names == expected.names and (again.is_test == expected.is_test).all()


def test_cub_fingerprint_follows_the_data_not_the_place(tmp_path):
    a = read("cub", write_cub(tmp_path / "a"))
    assert a.fingerprint == read("cub", write_cub(tmp_path / "b")).fingerprint
    assert a.fingerprint != read("cub", write_cub(tmp_path / "c", train=5)).fingerprint


def edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: (root / "images" / "001.Bird_0" / "001.Bird_0_0002.jpg").unlink(), "001.Bird_0_0002.jpg"),
        (lambda root: (root / "classes.txt").unlink(), "lacks classes.txt"),
        (lambda root: edit(root / "image_class_labels.txt", "3 1\n", "3 9\n"), "no class 9"),
        (lambda root: edit(root / "train_test_split.txt", "3 1\n", ""), "no line for the image ids 3"),
        (lambda root: edit(root / "images.txt", "3 001", "three 001"), "images.txt, entry 3"),
        (
            lambda root: edit(root / "train_test_split.txt", "\n7 0\n", "\n7 2\n"),
            "train_test_split.txt, entry 7: .*7 2",
        ),
        (
            lambda root: edit(root / "image_class_labels.txt", "\n10 2\n", "\n10 3\n"),
            "1 of 24 .*: 002.Bird_1/002.Bird_1_0001.jpg has the class 003.Bird_2",
        ),
    ],
)
def test_cub_names_what_is_wrong(tmp_path, spoil, expected):
    root = write_cub(tmp_path / "CUB")
    spoil(root)
    with pytest.raises(UserError, match=expected):
        read("cub", root)


def test_cub_labels_of_another_root_are_refused(tmp_path):
    root, other = write_cub(tmp_path / "a", train=6), write_cub(tmp_path / "b", train=8)
    shutil.copyfile(other / "image_class_labels.txt", root / "image_class_labels.txt")
    with pytest.raises(UserError, match=r"6 of 24 images .*003.Bird_2_0003"):
        read("cub", root)


# --- MIT Indoor 67 ---


def shows_its_labels(data: Dataset) -> bool:
    """Whether each miniature image is a small RGB image in the colour of its class (where it is not grey)."""
    for index, label in enumerate(data.labels):
        image = data.load(index)
        assert (image.mode, image.size) == ("RGB", (12, 10))
        channels = np.asarray(image).mean(axis=(0, 1))
        if np.ptp(channels) > 5 and channels.argmax() != label:
            return False
    return True


def test_mit67_reads_the_official_lists(tmp_path):
    data = read("mit67", trees.write_mit67(tmp_path))
    assert data.classes == ("airport_inside", "artstudio", "auditorium")
    assert np.bincount(data.labels[~data.is_test]).tolist() == [4, 4, 4]
    assert np.bincount(data.labels[data.is_test]).tolist() == [2, 2, 2]
    # The first line of the list: of the last class, with a backslash, spaces and a Windows line end.
    assert (data.names[0], data.labels[0]) == ("auditorium/auditorium_3_altavista.jpg", 2)
    assert shows_its_labels(data)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: (root / "Images" / "artstudio" / "artstudio_2_altavista.jpg").unlink(), "artstudio_2_altavista"),
        (
            lambda root: edit(root / "TestImages.txt", "artstudio/", "library/"),
            "TestImages.txt, entry 3: .*TrainImages.txt .*library",
        ),
        (lambda root: edit(root / "TestImages.txt", "artstudio/", ""), "TestImages.txt, entry 3: .*{class}/{file}"),
        (
            lambda root: edit(root / "TrainImages.txt", "artstudio/artstudio_2_altavista.jpg", "../outside.jpg"),
            r"files outside .*: \.\./outside.jpg",
        ),
        (
            lambda root: edit(root / "TestImages.txt", "studio_4", "studio_2"),
            "in train and test: artstudio/art",
        ),
        (lambda root: (root / "TestImages.txt").unlink(), "lacks TestImages.txt. Get indoorCVPR_09.tar, .*indoor.html"),
    ],
)
def test_mit67_names_what_is_wrong(tmp_path, spoil, expected):
    root = trees.write_mit67(tmp_path)
    spoil(root)
    with pytest.raises(UserError, match=expected):
        read("mit67", root)


# --- Stanford Dogs ---


def test_dogs_reads_the_matlab_lists(tmp_path):
    data = read("dogs", trees.write_dogs(tmp_path))
    assert data.classes == trees.DOGS
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 2 + [1] * 2 + [2] * 2
    assert data.is_test.tolist() == [False] * 12 + [True] * 6
    assert data.names[12] == "n02085620-Chihuahua/n02085620_4.jpg"
    assert shows_its_labels(data)


def test_dogs_classes_are_in_the_order_of_the_labels_not_of_the_names(tmp_path):
    root = trees.write_dogs(tmp_path)
    first, second, third = (f"{name}/{name.split('-')[0]}_" for name in trees.DOGS)
    trees.write_dogs_list(root / "train_list.mat", [(f"{first}0.jpg", 3), (f"{second}0.jpg", 1), (f"{third}0.jpg", 2)])
    trees.write_dogs_list(root / "test_list.mat", [(f"{first}4.jpg", 3)])
    data = read("dogs", root)
    assert data.classes == (trees.DOGS[1], trees.DOGS[2], trees.DOGS[0])
    assert data.labels.tolist() == [2, 0, 1, 2]


CHIHUAHUA, SPANIEL = "n02085620-Chihuahua/n02085620_0.jpg", "n02085782-Japanese_spaniel/n02085782_0.jpg"


def damage(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def lose_a_label(path: Path) -> None:
    content = loadmat(path)
    savemat(path, {"file_list": content["file_list"], "labels": content["labels"][1:]})


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: (root / "Images" / SPANIEL).unlink(), "1 of 18 images .*n02085782_0.jpg"),
        (lambda root: damage(root / "train_list.mat", 0.5), "train_list.mat cannot be read"),
        (lambda root: damage(root / "test_list.mat", 0), "test_list.mat cannot be read"),
        (lambda root: (root / "test_list.mat").write_text("<html>404</html>" * 50), "test_list.mat cannot be read"),
        (lambda root: savemat(root / "test_list.mat", {"labels": [1]}), "test_list.mat cannot.*file_list"),
        (lambda root: trees.write_dogs_list(root / "train_list.mat", [(CHIHUAHUA, 1.5)]), "whole numbers"),
        (lambda root: lose_a_label(root / "train_list.mat"), "12 files, 11 labels"),
        (
            lambda root: trees.write_dogs_list(root / "train_list.mat", [(CHIHUAHUA, 1), (SPANIEL, 1)]),
            "give label 1 to n02085620-Chihuahua and to n02085782-Japanese_spaniel",
        ),
        (lambda root: trees.write_dogs_list(root / "train_list.mat", [(CHIHUAHUA, 2)]), "Chihuahua the labels 2 and 1"),
        (lambda root: trees.write_dogs_list(root / "train_list.mat", [(CHIHUAHUA, 1)]), "lacks: .*spaniel.*Maltese"),
    ],
)
def test_dogs_names_what_is_wrong(tmp_path, spoil, expected):
    root = trees.write_dogs(tmp_path)
    spoil(root)
    with pytest.raises(UserError, match=expected):
        read("dogs", root)


@pytest.mark.parametrize(("labels", "wrong"), [((1, 7), 6), ((0, 1), -1)])
def test_dogs_labels_out_of_range(tmp_path, labels, wrong):
    root = trees.write_dogs(tmp_path)
    for name in ("train_list.mat", "test_list.mat"):
        trees.write_dogs_list(root / name, list(zip((CHIHUAHUA, SPANIEL), labels, strict=True)))
    with pytest.raises(UserError, match=rf"must be in 0\.\.1, but \S+ has label {wrong}"):
        read("dogs", root)


# --- Caltech-256 and Caltech-101 ---


def drawn(data: Dataset, label: int) -> tuple[set[str], set[str]]:
    """Names of the training and of the test images of one class."""
    names, mine = np.array(data.names), data.labels == label
    return set(names[mine & ~data.is_test].tolist()), set(names[mine & data.is_test].tolist())


def draw_256(root: Path, train: int, test: int | None = 2, *overrides: str) -> Dataset:
    test = "null" if test is None else test
    sizes = (f"dataset.train_per_class={train}", f"dataset.test_per_class={test}")
    return read("caltech256_30", root, *sizes, *overrides)


def test_caltech256_draws_from_the_images_of_each_class(tmp_path):
    data = draw_256(trees.write_caltech256(tmp_path), 3)
    assert data.classes == ("056.dog", "198.spider", "257.clutter")
    assert np.bincount(data.labels[~data.is_test]).tolist() == [3, 3, 3]
    assert np.bincount(data.labels[data.is_test]).tolist() == [2, 2, 2]
    assert len(set(data.names)) == 15
    assert data.load(0).mode == "RGB"


def test_caltech256_oddities_are_no_images(tmp_path):
    data = draw_256(trees.write_caltech256(tmp_path, images=5), 3, None)
    assert data.names[:5] == tuple(f"056.dog/056_{number:04d}.jpg" for number in range(1, 6))
    assert len(data.names) == 15


def test_caltech256_draw_is_seeded(tmp_path):
    root = trees.write_caltech256(tmp_path)
    data, again, other = draw_256(root, 3), draw_256(root, 3), draw_256(root, 3, 2, "dataset.subset_seed=1")
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert all(drawn(data, label) != drawn(other, label) for label in range(3))
    # Classes differ from each other, too: images of the first class and of the second have other numbers.
    assert {name[-8:] for name in drawn(data, 0)[0]} != {name[-8:] for name in drawn(data, 1)[0]}


def test_caltech256_30_is_part_of_60_with_the_same_test_images(tmp_path):
    root = trees.write_caltech256(tmp_path)
    small, large = draw_256(root, 3), draw_256(root, 6)
    for label in range(3):
        (train, test), (more, same) = drawn(small, label), drawn(large, label)
        assert train < more and test == same and not more & test


def test_caltech256_all_left_images_are_tested_on(tmp_path):
    root = trees.write_caltech256(tmp_path)
    small, large = draw_256(root, 3, None), draw_256(root, 6, None)
    assert np.bincount(large.labels[large.is_test]).tolist() == [6, 6, 6]
    assert drawn(small, 0)[0] < drawn(large, 0)[0]


def test_both_sizes_of_caltech256_have_their_official_counts(tmp_path):
    root = trees.write_caltech256(tmp_path, images=80)
    for name, train in (("caltech256_30", 30), ("caltech256_60", 60)):
        data = read(name, root)
        assert data.name == name
        assert np.bincount(data.labels[~data.is_test]).tolist() == [train] * 3
        assert np.bincount(data.labels[data.is_test]).tolist() == [20] * 3


@pytest.mark.parametrize("name", ["caltech256_30", "caltech101"])
def test_caltech_without_clutter_draws_the_same_images_of_the_other_classes(tmp_path, name):
    root = (trees.write_caltech256 if name == "caltech256_30" else trees.write_caltech101)(tmp_path)
    sizes = ("dataset.train_per_class=3", "dataset.test_per_class=2")
    with_it, without = (read(name, root, *sizes, f"dataset.clutter={value}") for value in ("true", "false"))
    clutter = "257.clutter" if name == "caltech256_30" else "BACKGROUND_Google"
    assert with_it.classes == (*without.classes, clutter) and clutter not in without.classes
    assert with_it.names[: len(without.names)] == without.names and len(with_it.names) == len(without.names) + 5
    assert with_it.is_test[: len(without.names)].tolist() == without.is_test.tolist()


@pytest.mark.parametrize(("test", "last"), [(2, 62), (20, 80), (None, 81)])
def test_caltech256_fixed_numbering(tmp_path, test, last):
    data = draw_256(trees.write_caltech256(tmp_path, images=81), 30, test, "dataset.numbering=fixed")
    train, tested = drawn(data, 1)
    assert train == {f"198.spider/198_{number:04d}.jpg" for number in range(1, 31)}
    assert tested == {f"198.spider/198_{number:04d}.jpg" for number in range(61, last + 1)}


@pytest.mark.parametrize(
    ("spoil", "overrides", "expected"),
    [
        (lambda folder: (folder / "056.dog" / "056_0001.jpg").unlink(), (), "Class 056.dog .* has 4 images.*least 5"),
        (None, ("dataset.numbering=fixed",), r"Class 056.dog .* has 5 images.* 1\.\.3 and 61\.\.62: it lacks 61, 62"),
        (None, ("dataset.numbering=fixed", "dataset.train_per_class=61"), "at most 60"),
        (None, ("dataset.numbering=fixed", "dataset.test_per_class=null"), r"61\.\.61: it lacks 61"),
        (None, ("dataset.test_per_class=null", "dataset.train_per_class=5"), "has 5 images.*null need at least 6"),
        (lambda folder: (folder / "257.clutter").rename(folder / "clutter"), (), "no background class 257.clutter"),
        (lambda folder: [path.rename(folder / f"_{path.name}") for path in folder.iterdir()], (), "no class folder"),
        (lambda folder: folder.rename(folder.parent / "256"), (), "lacks 256_ObjectCategories"),
    ],
)
def test_caltech256_names_what_is_wrong(tmp_path, spoil, overrides, expected):
    root = trees.write_caltech256(tmp_path, images=5)
    if spoil:
        spoil(root / "256_ObjectCategories")
    with pytest.raises(UserError, match=expected):
        draw_256(root, 3, 2, *overrides)


def test_caltech101_reads_every_class_but_the_background(tmp_path):
    root = trees.write_caltech101(tmp_path, images=31)
    data = read("caltech101", root)
    assert data.classes == ("Faces", "accordion", "yin_yang")
    assert np.bincount(data.labels[~data.is_test]).tolist() == [30] * 3
    assert np.bincount(data.labels[data.is_test]).tolist() == [1] * 3
    with pytest.raises(UserError, match="fixed is a rule for Caltech-256"):
        read("caltech101", root, "dataset.numbering=fixed")


def test_caltech_downloads_go_where_they_are_looked_for(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(
        torchvision.datasets, "Caltech256", lambda root, download: trees.write_caltech256(root / "caltech256")
    )
    monkeypatch.setattr(torchvision.datasets, "Caltech101", lambda root, download: trees.write_caltech101(root))
    overrides = ("dataset.download=true", "dataset.train_per_class=3")
    assert len(draw_256(tmp_path / "caltech256", 3, 2, "dataset.download=true").classes) == 3
    assert len(read("caltech101", tmp_path, *overrides).classes) == 3
    with pytest.raises(UserError, match="a folder called caltech256, but dataset.root is"):
        draw_256(tmp_path / "elsewhere", 3, 2, "dataset.download=true")


# --- Stanford-40 ---


def test_stanford40_reads_the_lists_of_each_action(tmp_path):
    data = read("stanford40", trees.write_stanford40(tmp_path))
    assert data.classes == ("applauding", "blowing_bubbles", "phoning")
    assert data.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert data.is_test.tolist() == ([False] * 4 + [True] * 2) * 3
    assert data.names[3:5] == ("applauding_006.jpg", "applauding_001.jpg")
    assert shows_its_labels(data)


def test_stanford40_ignores_what_a_mac_adds(tmp_path):
    root = trees.write_stanford40(tmp_path)
    (root / "ImageSplits" / "._applauding_train.txt").write_bytes(b"\x00\x05\x16\x07")
    assert len(read("stanford40", root).classes) == 3


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: (root / "ImageSplits" / "phoning_test.txt").unlink(), "lacks ImageSplits/phoning_test.txt"),
        (lambda root: (root / "ImageSplits" / "phoning_train.txt").unlink(), "lacks ImageSplits/phoning_train.txt"),
        (
            lambda root: [path.unlink() for path in (root / "ImageSplits").glob("*_t*.txt")],
            "no list ImageSplits/{class}_train",
        ),
        (lambda root: (root / "JPEGImages" / "phoning_004.jpg").unlink(), "1 of 18 images .*phoning_004.jpg"),
        (lambda root: edit(root / "ImageSplits" / "phoning_test.txt", "phoning_001", "../outside"), r"\.\./outside"),
        (lambda root: (root / "JPEGImages").rename(root / "images"), "lacks JPEGImages"),
    ],
)
def test_stanford40_names_what_is_wrong(tmp_path, spoil, expected):
    root = trees.write_stanford40(tmp_path)
    spoil(root)
    with pytest.raises(UserError, match=expected):
        read("stanford40", root)


# --- Tiny-ImageNet-200 ---


def test_tiny_imagenet_reads_train_and_val(tmp_path):
    data = read("tiny_imagenet", trees.write_tiny_imagenet(tmp_path))
    assert data.classes == ("n02124075 Egyptian cat", "n01443537 goldfish", "n04067472 reel")
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0, 1, 2] * 2
    assert data.is_test.tolist() == [False] * 12 + [True] * 6
    assert data.names[4] == "train/n01443537/images/n01443537_0.JPEG" and data.names[-1] == "val/images/val_5.JPEG"
    assert shows_its_labels(data)


def test_tiny_imagenet_ignores_what_a_mac_adds(tmp_path):
    root = trees.write_tiny_imagenet(tmp_path)
    (root / "train" / "n01443537" / "images" / "._n01443537_0.JPEG").write_bytes(b"\x00\x05\x16\x07")
    assert len(read("tiny_imagenet", root).names) == 18


def test_tiny_imagenet_class_without_a_word(tmp_path):
    root = trees.write_tiny_imagenet(tmp_path)
    edit(root / "words.txt", "n01443537\tgoldfish, Carassius auratus\n", "")
    assert read("tiny_imagenet", root).classes[1] == "n01443537"


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: edit(root / "val" / "val_annotations.txt", "val_4.JPEG\tn01443537", "val_4.JPEG\tn9"), "entry 5"),
        (lambda root: edit(root / "val" / "val_annotations.txt", "val_4.JPEG\t", "val_4.JPEG "), "entry 5"),
        (lambda root: (root / "val" / "images" / "val_3.JPEG").unlink(), "1 of 18 images .*val_3.JPEG"),
        (
            lambda root: edit(root / "val" / "val_annotations.txt", "val_3", "../../outside"),
            r"files outside .*\.\./outs",
        ),
        (lambda root: edit(root / "wnids.txt", "n01443537", "n7"), "wnids.txt .*n01443537"),
        (lambda root: edit(root / "wnids.txt", "n01443537", "n02124075"), "wnids.txt names a class twice"),
        (lambda root: (root / "words.txt").unlink(), "lacks words.txt.*tiny-imagenet-200.zip"),
    ],
)
def test_tiny_imagenet_names_what_is_wrong(tmp_path, spoil, expected):
    root = trees.write_tiny_imagenet(tmp_path)
    spoil(root)
    with pytest.raises(UserError, match=expected):
        read("tiny_imagenet", root)


# --- any folder of images ---


@pytest.mark.parametrize("train", ["train", "Train", "training", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Test", "testing", "val", "VAL", "valid", "validation", "Validation"])
def test_folder_with_a_test_split(tmp_path, capsys, train, test):
    counts = {f"{train}/bees": 3, f"{train}/ants": 4, f"{test}/ants": 2, f"{test}/bees": 1}
    data = read("folder", trees.write_folder(tmp_path, **counts))
    assert data.classes == ("ants", "bees")
    assert data.labels.tolist() == [0] * 4 + [1] * 3 + [0] * 2 + [1]
    assert data.is_test.tolist() == [False] * 7 + [True] * 3
    assert (data.names[0], data.names[-1]) == (f"{train}/ants/000.jpg", f"{test}/bees/000.jpg")
    assert data.load(9).size == (12, 10)
    expected = "" if test.lower().startswith("test") else f"{tmp_path}: the test split is {test}/\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("others", "notice"),
    [
        (["test", "val"], "the test split is test/; left out: val/"),
        (["Validation", "Val", "Testing"], "the test split is Testing/; left out: Val/, Validation/"),
        (["test", "extra", "notes"], "the test split is test/; left out: extra/, notes/"),
        (["extra"], "the test split is drawn from train/; left out: extra/"),
    ],
)
def test_folder_says_what_it_leaves_out(tmp_path, capsys, others, notice):
    parts = {f"{part}/{name}": 2 for part in ("train", *others) for name in ("ants", "bees")}
    data = read("folder", trees.write_folder(tmp_path, **parts, **{".cache": 0, "__MACOSX": 0}))
    used = {"train", *others} - set(notice.split("out: ")[1].replace("/", "").split(", "))
    assert {name.split("/")[0] for name in data.names} == used
    assert capsys.readouterr().out == f"{tmp_path}: {notice}\n"


def test_folder_finds_images_at_any_depth_but_not_hidden_ones(tmp_path):
    root = trees.write_folder(tmp_path, **{"ants/2024/march": 2, "bees": 2, "__MACOSX/ants": 2, ".cache/ants": 2})
    for odd in (".hidden.jpg", ".thumbnails/a.jpg", "__MACOSX/b.jpg", "c.PNG", "d.Tiff"):
        trees.write_image(root / "bees" / odd)
    (root / "bees" / "notes.txt").write_text("no image")
    (root / "README.md").write_text("no class")
    data = read("folder", root)
    assert data.classes == ("ants", "bees")
    assert sorted(data.names) == [
        "ants/2024/march/000.jpg",
        "ants/2024/march/001.jpg",
        "bees/000.jpg",
        "bees/001.jpg",
        "bees/c.PNG",
        "bees/d.Tiff",
    ]


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_folder_without_a_test_split_is_split_class_by_class(tmp_path, prefix):
    root = trees.write_folder(tmp_path, **{f"{prefix}ants": 20, f"{prefix}bees": 10, f"{prefix}wasps": 2})
    data, again, other = (read("folder", root, f"dataset.subset_seed={seed}") for seed in (0, 0, 1))
    assert data.classes == ("ants", "bees", "wasps")
    assert np.bincount(data.labels[data.is_test]).tolist() == [4, 2, 1]
    assert np.bincount(data.labels[~data.is_test]).tolist() == [16, 8, 1]
    assert len(set(data.names)) == 32 and all(name.startswith(prefix) for name in data.names)
    assert data.fingerprint == again.fingerprint and drawn(data, 0) != drawn(other, 0)


@pytest.mark.parametrize(("fraction", "n_test"), [(0.01, 1), (0.3, 3), (0.5, 5), (0.99, 9)])
def test_folder_test_fraction_leaves_something_on_both_sides(tmp_path, fraction, n_test):
    root = trees.write_folder(tmp_path, ants=10, bees=10)
    data = read("folder", root, f"dataset.test_fraction={fraction}")
    assert np.bincount(data.labels[data.is_test]).tolist() == [n_test, n_test]


def test_folder_draws_of_classes_are_independent(tmp_path):
    data = read("folder", trees.write_folder(tmp_path, ants=20, bees=20), "dataset.test_fraction=0.5")
    ants, bees = ({Path(name).name for name in drawn(data, label)[1]} for label in (0, 1))
    assert ants != bees


def test_folder_image_beside_the_class_folders_of_a_split(tmp_path):
    parts = {"train/ants": 3, "train/bees": 3, "train": 1, "test/ants": 1, "test/bees": 1}
    assert len(read("folder", trees.write_folder(tmp_path, **parts)).names) == 8


def test_folder_class_may_be_called_like_a_split(tmp_path):
    assert read("folder", trees.write_folder(tmp_path, valid=2, invalid=2)).classes == ("invalid", "valid")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({}, "holds no class folder"),
        ({"": 3}, "holds no class folder"),
        ({"ants": 3}, "a single class folder, ants"),
        ({"train/ants": 3, "test/ants": 3}, "train holds a single class folder, ants"),
        ({"ants": 3, "bees": 3, "wasps": 0}, "without an image: wasps"),
        ({"train/ants": 3, "train/bees": 0, "val/ants": 1, "val/bees": 1}, "train without an image: bees"),
        ({"train/ants": 3, "train/bees": 3, "test/ants": 1, "test/wasps": 1}, "without a training image: wasps"),
        ({"train/ants": 3, "train/bees": 3, "test": 0}, "test holds no class folder"),
        ({"ants": 3, "bees": 1}, "Class bees of .* has one image"),
        (
            {"train/ants": 3, "train/bees": 3, "test/ants": 3, "test/bees": 3, "wasps": 2, "flies": 1},
            r"mixes two layouts: folders that hold images \(flies, wasps\) .*\(train, test\)",
        ),
        ({"train/ants": 3, "train/bees": 3, "test": 3}, r"mixes two layouts: .*\(test\) are beside .*\(train\)"),
        ({"ants": 3, "bees": 3, "test/ants": 3, "test/bees": 3}, r"mixes two layouts: .*\(ants, bees\) .*\(test\)"),
        ({"train": 3, "test": 3}, "has no train/<class>/; it holds the folders test, train"),
        ({"Train": 3, "Test": 3}, "has no train/<class>/; it holds the folders Test, Train"),
        ({"Testing/ants": 3, "Validation/ants": 3}, "has no train/<class>/; it holds the folders Testing, Validation"),
        ({"training/ants": 3, "validation/ants": 3}, "training holds a single class folder, ants"),
        ({"train/ants": 3, "Training/ants": 3}, "has 2 folders for the train split: train, Training. Keep one"),
        ({"train/ants": 3, "Test/ants": 3, "test/ants": 3}, "has 2 folders for the test split: Test, test. Keep one"),
        ({"test/ants": 3, "test/bees": 3, "notes": 0}, "has no train/<class>/; it holds the folders notes, test"),
    ],
)
def test_folder_names_what_is_wrong(tmp_path, tree, expected):
    with pytest.raises(UserError, match=expected):
        read("folder", trees.write_folder(tmp_path, **tree))


@pytest.mark.parametrize(("root", "expected"), [(None, "root is not set"), ("/no/such", "no folder /no/such")])
def test_folder_without_a_root(root, expected):
    with pytest.raises(UserError, match=expected):
        read("folder", root)


# --- all readers ---


def test_a_wrong_root_is_recognised(tmp_path):
    root = trees.write_stanford40(tmp_path)
    with pytest.raises(UserError, match=r"MIT Indoor 67 was not found: .*it looks like Stanford-40\)\. Get indoor"):
        read("mit67", root)


def test_fingerprints_follow_the_data_not_the_place(tmp_path):
    for write in (trees.write_mit67, trees.write_dogs, trees.write_stanford40, trees.write_tiny_imagenet):
        name = write.__name__.removeprefix("write_")
        a, b, c = (read(name, write(tmp_path / name / place, train=n)) for place, n in (("a", 4), ("b", 4), ("c", 5)))
        assert a.fingerprint == b.fingerprint != c.fingerprint


def test_readers_import_nothing_slow():
    slow = {"torch", "torchvision", "scipy.io"}
    code = f"import sys, delta_transfer.data; print(sorted({slow} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# --- decoding ---


def near(image: Image.Image, expected, tolerance: int = 3) -> bool:
    return image.mode == "RGB" and bool((np.abs(np.asarray(image, int) - np.asarray(expected)) <= tolerance).all())


@pytest.mark.parametrize(("mode", "file"), [("L", "a.jpg"), ("L", "a.png"), ("1", "a.png"), ("LA", "a.png")])
def test_grey_images_become_rgb(tmp_path, mode, file):
    Image.new("L", (12, 10), 255).convert(mode).save(tmp_path / file)
    assert near(read_image(tmp_path / file), (255, 255, 255))


@pytest.mark.parametrize(("mode", "file"), [("RGB", "a.jpg"), ("CMYK", "a.jpg"), ("P", "a.png"), ("P", "a.gif")])
def test_colours_survive(tmp_path, mode, file):
    Image.new("RGB", (12, 10), (204, 51, 0)).convert(mode).save(tmp_path / file, quality=95)
    with Image.open(tmp_path / file) as image:
        assert image.mode == mode
    assert near(read_image(tmp_path / file), (204, 51, 0))


def test_a_photo_is_turned_as_its_exif_data_says(tmp_path):
    pixels = np.zeros((10, 12, 3), np.uint8)
    pixels[:, :6] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be shown turned clockwise by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.size == (10, 12)
    assert near(image.crop((0, 0, 10, 4)), 255) and near(image.crop((0, 8, 10, 12)), 0)


def test_transparency_is_shown_on_white(tmp_path):
    pixels = np.zeros((10, 12, 4), np.uint8)
    pixels[:, 4:8] = (255, 0, 0, 128)
    pixels[:, 8:] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert near(image.crop((0, 0, 4, 10)), (255, 255, 255))
    assert near(image.crop((4, 0, 8, 10)), (255, 127, 127))
    assert near(image.crop((8, 0, 12, 10)), (255, 0, 0))


def test_transparent_colour_of_a_palette_is_shown_on_white(tmp_path):
    image = Image.new("P", (12, 10), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((3, 3), 1)
    image.save(tmp_path / "a.png", transparency=0)
    decoded = read_image(tmp_path / "a.png")
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((3, 3)) == (200, 0, 0)


DEEP = {  # grey values of more than 8 bits, in black, grey and white of a scale
    "16-bit": np.array([[0, 128 * 256, 65535]], np.uint16),
    "float": np.array([[0, 0.502, 1]], np.float32),
    "12-bit": np.array([[0, 2056, 4095]], np.uint16),
    "32-bit": np.array([[-7, 494, 993]], np.int32),
}


@pytest.mark.parametrize(
    ("kind", "scale"),
    [("16-bit", "full"), ("float", "full"), ("12-bit", 4095), ("12-bit", "minmax"), ("32-bit", "minmax"), ("float", 1)],
)
def test_pixels_of_more_than_8_bits_are_scaled_as_asked(tmp_path, kind, scale):
    Image.fromarray(DEEP[kind]).save(tmp_path / "a.tif")
    expected = np.array([[0, 128, 255]])[..., None].repeat(3, axis=2)
    assert near(read_image(tmp_path / "a.tif", Reading(scale)), expected, tolerance=0)


@pytest.mark.parametrize(
    ("kind", "scale"), [*((kind, None) for kind in DEEP), ("12-bit", 4000), ("32-bit", 1000), ("32-bit", "full")]
)
def test_pixels_without_a_scale_or_beyond_it_are_refused(tmp_path, kind, scale):
    Image.fromarray(DEEP[kind]).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="dataset.scale"):
        read_image(tmp_path / "a.tif", Reading(scale))


def test_a_constant_image_of_more_than_8_bits_stays_one(tmp_path):
    Image.fromarray(np.full((3, 3), 700, np.uint16)).save(tmp_path / "a.png")
    assert near(read_image(tmp_path / "a.png", Reading("minmax")), 0, tolerance=0)


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="finite"):
        read_image(tmp_path / "a.tif", Reading("minmax"))


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("file", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.webp"])
def test_damaged_files_raise_what_callers_expect(tmp_path, file, keep):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / file)
    damage(tmp_path / file, keep)
    with pytest.raises(UNREADABLE):
        read_image(tmp_path / file)


def test_file_names_that_are_not_utf8_are_read(tmp_path):
    counts = {"train/ants": 2, "train/bees": 2, "test/ants": 1, "test/bees": 1}
    root = trees.write_folder(tmp_path / "photos", **counts)
    old = os.fsencode(root / "train" / "ants" / "000.jpg")
    os.rename(old, old.replace(b"000", b"caf\xe9"))
    assert len(read("folder", root).names) == 6

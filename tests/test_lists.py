"""A new data set with list files needs one YAML: its keys say which lists there are and what their lines look like."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from delta_transfer.common.errors import UserError
from delta_transfer.common.options import OptionError
from delta_transfer.data import load_dataset, publication
from delta_transfer.data.dataset import Dataset
from delta_transfer.data.readers.lists import ListsConfig

from .trees import write_image, write_lines

BIRDS = """
reader: lists
name: birds
images: photos
train_list: lists/train.txt
test_list: lists/test.txt
"""


def config_of(text: str, root: Path) -> ListsConfig:
    return OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(ListsConfig), OmegaConf.create(text), {"root": root})
    )


def read(text: str, root: Path) -> Dataset:
    return load_dataset(config_of(text, root))


def write(root: Path, lists: dict[str, list[str]], images: str = "photos") -> Path:
    """Two images of each of two birds, and `lists`."""
    for label, name in enumerate(("wren", "owl")):
        for number in (1, 2):
            write_image(root / images / name / f"{number}.png", label)
    for name, lines in lists.items():
        write_lines(root / name, lines)
    return root


def content(data: Dataset) -> list[tuple[str, str, bool]]:
    return [
        (name, data.classes[label], bool(test))
        for name, label, test in zip(data.names, data.labels, data.is_test, strict=True)
    ]


EXPECTED = [
    ("wren/1.png", "wren", False),
    ("owl/1.png", "owl", False),
    ("owl/2.png", "owl", True),
    ("wren/2.png", "wren", True),
]
TRAIN, TEST = ["wren/1.png", "owl/1.png"], ["owl/2.png", "wren/2.png"]
LISTS = {"lists/train.txt": TRAIN, "lists/test.txt": TEST}


@pytest.mark.parametrize(
    ("keys", "lists", "classes"),
    [
        ("", LISTS, ("owl", "wren")),
        (
            'line: "{file} {label}"',
            {"lists/train.txt": ["wren/1.png 2", "owl/1.png 10"], "lists/test.txt": ["owl/2.png 10", "wren/2.png 2"]},
            ("2", "10"),
        ),
        (
            'line: "{file},{label}"\nclasses: names.txt',
            {
                "lists/train.txt": ["wren/1.png,0", "owl/1.png,1"],
                "lists/test.txt": ["owl/2.png,1", "wren/2.png,0"],
                "names.txt": ["wren", "owl"],
            },
            ("wren", "owl"),
        ),
        (
            'line: "{class}/{file} {label}"',
            {
                "lists/train.txt": ["wren/1.png 0", "owl/1.png 1"],
                "lists/test.txt": ["owl/2.png 1", "wren/2.png 0"],
            },
            ("wren", "owl"),
        ),
        (
            'path: "{class}/{file}.png"',
            {"lists/train.txt": ["wren/1", "owl/1"], "lists/test.txt": ["owl/2", "wren/2"]},
            ("owl", "wren"),
        ),
        (
            'test_list: null\nline: "{class}/{file}\\t{train}"',
            {"lists/train.txt": ["wren/1.png\t1", "owl/1.png\t1", "owl/2.png\t0", "wren/2.png\t0"]},
            ("owl", "wren"),
        ),
        (
            "train_list: [a.txt, 'part{partition}.txt']\npartition: 7",
            {"a.txt": TRAIN[:1], "part7.txt": TRAIN[1:], "lists/test.txt": TEST},
            ("owl", "wren"),
        ),
    ],
)
def test_a_new_data_set_needs_one_yaml(tmp_path, keys, lists, classes):
    data = read(OmegaConf.to_yaml(OmegaConf.merge(*map(OmegaConf.create, (BIRDS, keys)))), write(tmp_path, lists))
    assert data.name == "birds" and data.classes == classes
    found = content(data)
    if classes == ("2", "10"):
        found = [(name, {"2": "wren", "10": "owl"}[bird], test) for name, bird, test in found]
    assert found == EXPECTED
    assert data.load(0).mode == "RGB"


def test_folders_of_a_class_each(tmp_path):
    root = write(write(tmp_path, {}, "photos/train"), {}, "photos/test")
    keys = (
        "reader: lists\nname: birds\nimages: photos\ntrain_list: 'train/{class}/*.png'\ntest_list: 'test/{class}/*.png'"
    )
    data = read(keys, root)
    assert data.names[:4] == ("train/owl/1.png", "train/owl/2.png", "test/owl/1.png", "test/owl/2.png")
    assert data.classes == ("owl", "wren") and data.is_test.tolist() == [False, False, True, True] * 2


def test_a_person_is_told_what_is_missing_and_where_to_get_it(tmp_path):
    keys = BIRDS + "title: Some Birds\nsource: birds.zip from the ornithologists\narchives: [birds.zip]\n"
    published = publication(config_of(keys, tmp_path))
    assert published.needs == ("lists/train.txt", "lists/test.txt", "photos") and published.archives == ("birds.zip",)
    with pytest.raises(UserError, match="Some Birds .*lists/train.txt.*birds.zip from the ornithologists"):
        read(keys, tmp_path)


@pytest.mark.parametrize(
    ("keys", "lists", "expected"),
    [
        ("", {"lists/train.txt": TRAIN, "lists/test.txt": ["wren/2.png", "robin/2.png"]}, "entry 2: .*robin"),
        ("", {"lists/train.txt": TRAIN, "lists/test.txt": TRAIN}, "wren/1.png, owl/1.png"),
        ("", {"lists/train.txt": TRAIN, "lists/test.txt": ["wren/3.png"]}, "1 of 3 .*wren/3.png"),
        ("", {"lists/train.txt": [], "lists/test.txt": TEST}, "owl"),
        ("classes: names.txt", {**LISTS, "names.txt": ["wren", "owl", "robin"]}, "robin"),
        ("classes: names.txt", {**LISTS, "names.txt": ["owl"]}, "entry 1: .*wren"),
        (
            'line: "{file} {label}"\nclasses: names.txt',  # labels that count from 1
            {"lists/train.txt": ["wren/1.png 1", "owl/1.png 2"], "lists/test.txt": [], "names.txt": ["wren", "owl"]},
            "entry 2: .* 2",
        ),
        (
            'line: "{class}/{file} {label}"',  # two classes of one number
            {"lists/train.txt": ["wren/1.png 0", "owl/1.png 0"], "lists/test.txt": ["owl/2.png 0"]},
            "1 of 3 .*wren/1.png",
        ),
        ('line: "{file}"', LISTS, "entry 1: .*class"),
    ],
)
def test_what_is_wrong_with_the_lists_is_named(tmp_path, keys, lists, expected):
    text = OmegaConf.to_yaml(OmegaConf.merge(*map(OmegaConf.create, (BIRDS, keys))))
    with pytest.raises(UserError, match=expected):
        read(text, write(tmp_path, lists))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ('line: "{class}"', "line"),
        ('line: "{file} {file}"', "line"),
        ("path: '{number}.jpg'", "path"),
        ("joined: {ids.txt: '{label}'}", "joined"),
        ("class_line: '{label}'", "class_line"),
        ("test_list: null", "test_list"),
        ('line: "{file} {train}"', "test_list"),
        ("train_list: 3", "train_list"),
        ("test_list: [/etc/passwd]", "test_list"),
        ("name: ../birds", "name"),
        ("partition: 0", "partition"),
    ],
)
def test_keys_that_make_no_sense_are_refused(tmp_path, keys, key):
    with pytest.raises(OptionError) as told:
        config_of(OmegaConf.to_yaml(OmegaConf.merge(*map(OmegaConf.create, (BIRDS, keys)))), tmp_path)
    assert told.value.key == f"dataset.{key}"

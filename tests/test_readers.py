"""Readers: miniature trees in the publishers' exact layouts, with their oddities."""

from pathlib import Path

import pytest

from delta_transfer.data import load_dataset
from delta_transfer.data.dataset import Dataset
from delta_transfer.errors import UserError

from .miniature import write_cub
from .test_config import composed


def read(name: str, root: Path, *overrides: str) -> Dataset:
    """What `delta-run dataset=<name> dataset.root=<root>` reads."""
    return load_dataset(composed(f"dataset={name}", f"dataset.root={root}", *overrides).dataset)


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
    ],
)
def test_cub_names_what_is_wrong(tmp_path, spoil, expected):
    root = write_cub(tmp_path / "CUB")
    spoil(root)
    with pytest.raises(UserError, match=expected):
        read("cub", root)

"""The stand-in for Food-101 has the publisher's layout."""

import runpy
import sys
from pathlib import Path

import pytest

from delta_transfer.data import load_dataset
from delta_transfer.data.dataset import counts_of
from delta_transfer.data.options import Counts

from .miniature import composed

SCRIPT = Path(__file__).parent.parent / "scripts" / "food101_stand_in.py"


def write(monkeypatch, folder: Path, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--output", str(folder), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_part_of_the_stand_in_is_read_as_food101(tmp_path, monkeypatch):
    write(monkeypatch, tmp_path, "--fraction", "0.004", "--side", "16")
    dataset = load_dataset(composed("dataset=food101", f"data_dir={tmp_path}").dataset)
    assert counts_of(dataset) == Counts(101, 101 * 3, 101)
    assert dataset.copies() == ([], [])  # no image is there twice
    assert dataset.load(0).size == (16, 12)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    write(monkeypatch, tmp_path, "--fraction", "0.004", "--side", "16")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}


@pytest.mark.parametrize("fraction", ["0", "1.5", "-0.1"])
def test_a_fraction_is_part_of_the_whole(fraction, tmp_path, monkeypatch):
    with pytest.raises(SystemExit):
        write(monkeypatch, tmp_path, "--fraction", fraction)
    assert not list(tmp_path.iterdir())

"""delta-data: what is here, whether it is whole, and the stores that runs read."""

import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from delta_transfer.cli.data import main
from delta_transfer.cli.sources import choices
from delta_transfer.data.store import open_store

from .miniature import delta_run, tiny_overrides, write_cub
from .trees import write_dogs, write_image, write_mit67


@pytest.fixture
def delta_data(capsys):
    def call(*arguments: object) -> tuple[int, str]:
        status = main([str(a) for a in arguments])
        output = capsys.readouterr()
        assert "Traceback" not in output.out + output.err
        return status, output.out + output.err

    return call


def row(output: str, name: str) -> list[str]:
    (line,) = [line for line in output.splitlines() if line.startswith(f"{name} ")]
    return " ".join(line.split()).removeprefix(name).split()


def test_list_says_what_is_found_and_what_is_official(tmp_path, delta_data):
    write_cub(tmp_path / "CUB_200_2011")
    status, output = delta_data("list", f"data_dir={tmp_path}")
    assert status == 0
    assert [line.split()[0] for line in output.splitlines()[2 : 2 + len(choices("dataset"))]] == [*choices("dataset")]
    assert row(output, "cub")[:-1] == ["3", "/", "200", "18", "/", "5,994", "6", "/", "5,794", "subset"]
    assert row(output, "dogs")[:-1] == ["-", "/", "120", "-", "/", "12,000", "-", "/", "8,580", "not", "here"]
    assert row(output, "glyphs") == ["33", "165", "1,650", "ready"]
    assert row(output, "dogs")[-1] == str(tmp_path / "stanford_dogs")


def test_list_goes_on_after_a_data_set_that_is_not_usable(tmp_path, delta_data, monkeypatch):
    monkeypatch.setattr("delta_transfer.cli.sources.choices", lambda group: ["cub", "mit67"])
    root = write_cub(tmp_path / "CUB_200_2011")
    (root / "train_test_split.txt").unlink()
    write_mit67(tmp_path / "mit67")
    status, output = delta_data("list", f"data_dir={tmp_path}")
    assert status == 0
    assert row(output, "cub")[-3:-1] == ["not", "usable"] and "lacks train_test_split.txt" in output
    assert row(output, "mit67")[-2] == "subset"


def test_verify_a_subset_is_not_an_error(tmp_path, delta_data):
    root = write_cub(tmp_path / "CUB")
    status, output = delta_data("verify", "cub", f"dataset.root={root}")
    assert status == 0
    for text in ("3 of 200", "18 of 5,994", "6 of 5,794", "a subset", "24 decode", "also in train: none"):
        assert text in output


def test_verify_official_counts_are_not_a_subset(tmp_path, delta_data):
    root = write_cub(tmp_path / "CUB")
    exact = "dataset.official={classes:3,train:18,test:6}"
    status, output = delta_data("verify", "cub", f"dataset.root={root}", exact)
    assert status == 0 and "subset" not in output
    status, output = delta_data("verify", "cub", f"dataset.root={root}", exact.replace("18", "17"))
    assert status == 1 and "more than the official data set holds" in output


def test_verify_names_every_broken_image_and_every_leak(tmp_path, delta_data):
    root = tmp_path / "photos"
    for number in range(14):
        part = "train" if number < 8 else "test"
        write_image(root / part / ("ants", "bees")[number % 2] / f"{number}.jpg", number)
    images = sorted(path for path in root.rglob("*") if path.is_file())
    train, test = ([path for path in images if part in path.parts] for part in ("train", "test"))
    Image.open(train[0]).convert("RGB").save(root / "test" / "ants" / "leak.png")  # the same pixels, another file
    shutil.copyfile(train[1], root / "train" / "ants" / "twin.png")
    test[-1].write_bytes(b"no image")
    train[-1].write_bytes(train[-1].read_bytes()[:40])
    status, output = delta_data("verify", "folder", f"dataset.root={root}")
    assert status == 1
    for path in (test[-1], train[-1]):
        assert path.relative_to(root).as_posix() in output
    assert "2 of 16 cannot be read" in output
    assert f"also in train: 1: test/ants/leak.png = {train[0].relative_to(root).as_posix()}" in output
    assert "training images that are there more than once: 1" in output


def test_prepared_store_is_the_one_that_the_run_reads(tmp_path, delta_data, monkeypatch, capsys):
    tiny = tiny_overrides(write_cub(tmp_path / "CUB"), tmp_path / "results")
    status, output = delta_data("prepare", "cub", *tiny)
    assert status == 0 and "24 images, 20 x 20 pixels" in output
    (pixels,) = tmp_path.glob("results/cache/stores/*/pixels")
    before = pixels.stat().st_mtime_ns
    assert delta_run(monkeypatch, *tiny, "reg=l2") == 0
    assert "decoding" not in capsys.readouterr().out
    assert [pixels] == list(tmp_path.glob("results/cache/stores/*/pixels")) and pixels.stat().st_mtime_ns == before


def test_prepare_keeps_the_aspect_where_the_protocol_does(tmp_path, delta_data):
    root = write_cub(tmp_path / "CUB")  # images of 30 x 24 pixels
    overrides = [*tiny_overrides(root, tmp_path / "results"), "schedule=paper_augmented"]
    status, output = delta_data("prepare", "cub", *overrides)
    assert status == 0 and "shorter side 20 pixels" in output
    (folder,) = tmp_path.glob("results/cache/stores/cub-keep-*")
    assert (np.fromfile(folder / "sizes", dtype=np.int64).reshape(-1, 2) == (20, 25)).all()


def test_prepare_unpacks_the_publishers_archives(tmp_path, delta_data):
    tree = write_dogs(tmp_path / "tree")
    root = tmp_path / "stanford_dogs"
    root.mkdir()
    with tarfile.open(root / "images.tar", "w") as tar:
        tar.add(tree / "Images", "Images")
    with tarfile.open(root / "lists.tar", "w") as tar:
        for path in tree.glob("*.mat"):
            tar.add(path, path.name)
    overrides = (f"data_dir={tmp_path}", "backbone.image_size=8", "backbone.resize=10", f"results_dir={tmp_path / 'r'}")
    assert delta_data("verify", "dogs", *overrides)[0] == 1  # only prepare writes
    status, output = delta_data("prepare", "dogs", *overrides)
    assert status == 0 and "unpacked" in output and "10 x 10 pixels" in output
    assert delta_data("verify", "dogs", *overrides)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("verify", "cub"), "CUB-200-2011 was not found"),
        (("prepare", "cub", "dataset.root=/no/such/folder"), "there is no folder /no/such/folder"),
        (("verify", "cubs"), "cubs"),
        (("verify", "cub", "dataset.rot=/data"), "rot"),
        (("prepare", "mit67", "dataset.download=true"), "has no download"),
    ],
)
def test_bad_input_is_one_clear_message(arguments, expected, tmp_path, monkeypatch, delta_data):
    monkeypatch.chdir(tmp_path)
    status, output = delta_data(*arguments)
    assert status == 1 and expected in output
    assert not list(tmp_path.iterdir())


def test_a_store_in_the_making_is_never_read(tmp_path):
    """A killed build leaves only a hidden folder, which is not the one that a run opens."""
    from .test_data import Killed, dataset_of, picture

    data = dataset_of([0] * 20 + [1] * 20, [False, True] * 20, picture)

    def kill(done: int) -> None:
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        open_store(data, 12, "squash", tmp_path, kill)
    assert all(path.name.startswith(".") for path in (tmp_path / "stores").iterdir())

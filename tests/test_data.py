"""Draws and splits, store, batches."""

import json
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import SoftFileLease
from PIL import Image
from torchvision import transforms

from delta_transfer.common.errors import UserError
from delta_transfer.data import contents
from delta_transfer.data.dataset import Dataset, make_splits
from delta_transfer.data.files import from_files
from delta_transfer.data.loader import Loader, free_memory, random_boxes
from delta_transfer.data.options import DatasetConfig, SplitConfig
from delta_transfer.data.store import Store, bytes_to_write, decoded, open_store, store_path, wrong_checksums
from delta_transfer.records.locks import LEASE_SECONDS


def dataset_of(labels, is_test, load=None) -> Dataset:
    labels = np.array(labels)
    names = tuple(f"image{i}" for i in range(len(labels)))
    classes = tuple(f"class{i}" for i in range(labels.max() + 1))
    return Dataset("toy", classes, labels, np.array(is_test), names, load, "fingerprint")


# --- draws and splits ---


def balanced(per_class: int, classes: int = 3) -> Dataset:
    labels = np.repeat(np.arange(classes), per_class + 2)
    return dataset_of(labels, np.tile([False] * per_class + [True] * 2, classes))


def test_images_per_class_is_stratified_and_seeded():
    data = balanced(10)
    first = make_splits(data, DatasetConfig(images_per_class=4), SplitConfig())
    assert np.bincount(data.labels[first.train]).tolist() == [4, 4, 4]
    assert not data.is_test[first.train].any() and data.is_test[first.test].all() and len(first.test) == 6
    again = make_splits(data, DatasetConfig(images_per_class=4), SplitConfig())
    other = make_splits(data, DatasetConfig(images_per_class=4, subset_seed=1), SplitConfig())
    assert first.train.tolist() == again.train.tolist() != other.train.tolist()


def test_smaller_draws_are_part_of_larger_ones():
    data = balanced(10)
    small, large = (make_splits(data, DatasetConfig(images_per_class=n), SplitConfig()).train.tolist() for n in (3, 7))
    assert set(small) < set(large)


@pytest.mark.parametrize(("rate", "expected"), [(0.15, 2), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_sample_rate_rounds_up(rate, expected):
    data = balanced(10)
    splits = make_splits(data, DatasetConfig(sample_rate=rate), SplitConfig())
    assert np.bincount(data.labels[splits.train]).tolist() == [expected] * 3


def test_validation_split_is_stratified_and_disjoint_from_train_and_test():
    data = balanced(10)
    splits = make_splits(data, DatasetConfig(), SplitConfig(val_fraction=0.3))
    assert np.bincount(data.labels[splits.val]).tolist() == [3, 3, 3]
    assert sorted([*splits.train, *splits.val]) == np.flatnonzero(~data.is_test).tolist()


def test_folds_cover_the_training_split_once():
    data = balanced(10)
    folds = [make_splits(data, DatasetConfig(), SplitConfig(folds=3, fold=k)) for k in range(3)]
    assert sorted(np.concatenate([f.val for f in folds])) == np.flatnonzero(~data.is_test).tolist()
    assert all(not set(f.val) & set(f.train) for f in folds)


def test_the_draw_does_not_depend_on_the_split():
    data = balanced(10)
    draw = DatasetConfig(images_per_class=5)
    whole = make_splits(data, draw, SplitConfig())
    cut = make_splits(data, draw, SplitConfig(val_fraction=0.4))
    assert sorted([*cut.train, *cut.val]) == whole.train.tolist()


def test_class_without_training_images_is_named():
    with pytest.raises(UserError, match="class1"):
        make_splits(dataset_of([0, 0, 1], [False, True, True]), DatasetConfig(), SplitConfig())


def test_fingerprint_of_the_splits():
    data = balanced(10)
    prints = {
        make_splits(data, DatasetConfig(images_per_class=n), SplitConfig(val_fraction=v)).fingerprint(data)
        for n, v in ((4, 0.0), (5, 0.0), (4, 0.25))
    }
    assert len(prints) == 3


# --- store ---


def picture(index: int, height: int = 20, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_of(store: Store, index: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    height, width = store.sizes[index]
    start = store.sizes[:index].prod(axis=1).sum()
    return store.pixels[start : start + height * width].reshape(height, width, 3)


def test_store_holds_squashed_images_and_is_built_once(tmp_path):
    calls = []

    def load(index: int) -> Image.Image:
        calls.append(index)
        return picture(index)

    data = dataset_of([0, 0, 1, 1], [False, True] * 2, load)
    store = open_store(data, 12, "squash", tmp_path)
    assert store.pixels.dtype == np.uint8 and store.sizes.tolist() == [[12, 12]] * 4
    for index in range(4):
        expected = np.asarray(picture(index).resize((12, 12), Image.Resampling.BILINEAR))
        assert (image_of(store, index) == expected).all()
    calls.clear()
    assert (open_store(data, 12, "squash", tmp_path).pixels == store.pixels).all() and not calls
    open_store(data, 10, "squash", tmp_path)
    assert sorted(calls) == [0, 1, 2, 3]
    left = [path.name for path in (tmp_path / "stores").iterdir() if not path.name.endswith(".lock")]
    assert len(left) == 2 and not any("partial" in name for name in left)


def test_a_store_that_is_opened_again_does_not_look_for_images_of_one_colour(tmp_path):
    plain = Image.new("RGB", (20, 20), "red")
    data = dataset_of([0, 0, 1], [False, True, False], lambda index: plain if index == 1 else picture(index))
    store = open_store(data, 12, "squash", tmp_path)
    assert store.constant().tolist() == [1]
    description = store_path(data, 12, "squash", tmp_path) / "store.json"
    made = json.loads(description.read_text())
    assert made.pop("constant") == [1]
    description.write_text(json.dumps(made))  # as in an earlier version
    for _ in range(2):
        assert replace(open_store(data, 12, "squash", tmp_path), pixels=None).constant().tolist() == [1]


def test_kept_aspect_is_torchvisions_resize(tmp_path):
    shapes = [(20, 31), (31, 20), (16, 16), (9, 47)]
    data = dataset_of([0, 0, 1, 1], [False, True] * 2, lambda i: picture(i, *shapes[i]))
    store = open_store(data, 12, "keep", tmp_path)
    for index, shape in enumerate(shapes):
        expected = np.asarray(transforms.Resize(12)(picture(index, *shape)))
        assert store.sizes[index].tolist() == list(expected.shape[:2])
        assert (image_of(store, index) == expected).all()
        start = store.starts[index]
        assert (store.pixels[start : start + expected[:, :, 0].size].reshape(expected.shape) == expected).all()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("torn", [False, True])
def test_interrupted_build_goes_on_where_it_stopped(tmp_path, monkeypatch, torn):
    monkeypatch.setattr("delta_transfer.data.store.SYNC_BYTES", 12 * 12 * 3 * 2)  # safe on disk after 3, 6, 9 images
    labels, is_test = [0] * 20 + [1] * 20, [False, True] * 20
    expected = open_store(dataset_of(labels, is_test, picture), 12, "squash", tmp_path / "whole")

    def kill(done: int) -> None:
        if done == 11:
            raise Killed

    with pytest.raises(Killed):
        open_store(dataset_of(labels, is_test, picture), 12, "squash", tmp_path, kill)
    (partial,) = (tmp_path / "stores").glob("*.partial")
    path = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    assert bytes_to_write(path, 40, 12, "squash") == 31 * 12 * 12 * 3
    if torn:  # what a crash can leave: more pixels than the record of what is safe
        with open(partial / "pixels", "ab") as file:
            file.write(b"torn")
    loaded = []

    def load(index: int) -> Image.Image:
        loaded.append(index)
        return picture(index)

    store = open_store(dataset_of(labels, is_test, load), 12, "squash", tmp_path)
    assert (store.pixels == expected.pixels).all() and (store.sizes == expected.sizes).all()
    assert sorted(loaded) == list(range(9, 40))
    assert not list((tmp_path / "stores").glob("*.partial"))


def test_the_threads_that_decode_compute_the_checksums(tmp_path, monkeypatch):
    threads, crc32 = {"decode": set(), "checksum": set()}, zlib.crc32

    def load(index: int) -> Image.Image:
        threads["decode"].add(threading.current_thread())
        return picture(index)

    def checksum(pixels: memoryview) -> int:
        threads["checksum"].add(threading.current_thread())
        return crc32(pixels)

    monkeypatch.setattr(zlib, "crc32", checksum)
    open_store(dataset_of([0, 1], [False, True], load), 12, "squash", tmp_path)
    assert threads["checksum"] == threads["decode"] and threading.main_thread() not in threads["decode"]


def test_a_second_builder_waits_for_the_first(tmp_path, capsys):
    data = dataset_of([0, 1], [False, True], picture)
    path = store_path(data, 12, "squash", tmp_path)
    path.parent.mkdir(parents=True)
    with SoftFileLease(path.with_name(f".{path.name}.lock"), lease_duration=LEASE_SECONDS):
        second = threading.Thread(target=open_store, args=(data, 12, "squash", tmp_path))
        second.start()
        second.join(timeout=0.3)
        assert second.is_alive() and not path.exists()
    second.join(timeout=10)
    assert path.exists() and "waiting for another process" in capsys.readouterr().out


def test_unreadable_images_are_all_named_and_no_store_is_left(tmp_path):
    def load(index: int) -> Image.Image:
        if index in (3, 30):
            raise OSError("broken")
        return picture(index)

    data = dataset_of([0] * 20 + [1] * 20, [False, True] * 20, load)
    with pytest.raises(UserError, match=r"2 images of toy .*image3 \(broken\); image30 \(broken\)"):
        open_store(data, 12, "squash", tmp_path)
    assert not list((tmp_path / "stores").iterdir())


many_cores = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def on_many_cores(monkeypatch) -> None:
    monkeypatch.setattr("delta_transfer.common.cores.USABLE", 8)
    monkeypatch.setattr("delta_transfer.data.store.AT_ONCE", 2)


@many_cores
@pytest.mark.parametrize("aspect", ["squash", "keep"])
def test_processes_decode_what_threads_do(tmp_path, monkeypatch, aspect):
    loaded, broken = [], set()

    def load(index: int) -> Image.Image:
        loaded.append(index)
        if index in broken:
            raise OSError("broken")
        return picture(index, 20, 20 + index)

    data = dataset_of([0] * 20 + [1] * 20, [False, True] * 20, load)
    expected = open_store(data, 12, aspect, tmp_path / "threads")
    assert len(loaded) == 40
    on_many_cores(monkeypatch)
    found = open_store(data, 12, aspect, tmp_path / "processes")
    assert len(loaded) == 40, "decoded in this process"
    assert (found.pixels == expected.pixels).all() and (found.sizes == expected.sizes).all()
    assert not wrong_checksums(store_path(data, 12, aspect, tmp_path / "processes"))
    broken |= {3, 30}
    with pytest.raises(UserError, match=r"2 images of toy .*image3 \(broken\); image30 \(broken\)"):
        open_store(data, 12, aspect, tmp_path / "again")
    assert not multiprocessing.active_children()


@many_cores
def test_processes_end_with_a_killed_parent(tmp_path, monkeypatch):
    """The parent reads nothing more, so that the pipe to it is full."""
    on_many_cores(monkeypatch)
    data = dataset_of([0] * 40, [False] * 40, lambda index: picture(index, 400, 400))
    reader, writer = os.pipe()  # each worker holds the writing end

    def build() -> None:
        os.close(reader)
        for _ in decoded(data, 400, "squash"):
            os.kill(os.getpid(), signal.SIGKILL)

    parent = multiprocessing.get_context("fork").Process(target=build)
    parent.start()
    os.close(writer)
    parent.join(60)
    assert parent.exitcode == -signal.SIGKILL
    with open(reader, "rb") as pipe:
        assert select.select([pipe], [], [], 60)[0], "a worker is left"


def test_python_ends_with_an_unfinished_build_in_processes():
    program = """
import numpy as np
from PIL import Image
from delta_transfer.common import cores
from delta_transfer.data import store
from delta_transfer.data.dataset import Dataset
cores.USABLE, store.AT_ONCE = 8, 2
picture = Image.new("RGB", (20, 20))
data = Dataset("toy", ("a",), np.zeros(400, int), np.zeros(400, bool), (), lambda index: picture, listing="")
images = store.decoded(data, 12, "squash")
next(images)
raise OSError("no space left")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "no space left" in ended.stderr


@many_cores
def test_a_killed_process_of_the_store_is_named_and_the_build_goes_on(tmp_path, monkeypatch):
    on_many_cores(monkeypatch)
    here, killed = os.getpid(), tmp_path / "killed"

    def load(index: int) -> Image.Image:
        if index == 30 and os.getpid() != here and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return picture(index)

    data = dataset_of([0] * 20 + [1] * 20, [False, True] * 20, load)
    with pytest.raises(UserError, match="process that decodes images was killed"):
        open_store(data, 12, "squash", tmp_path)
    assert len(open_store(data, 12, "squash", tmp_path).sizes) == 40
    assert not wrong_checksums(store_path(data, 12, "squash", tmp_path))


@many_cores
def test_processes_leave_the_random_numbers_of_the_program(monkeypatch):
    on_many_cores(monkeypatch)
    data = dataset_of([0] * 40, [False] * 40, picture)
    before = torch.get_rng_state()
    assert len([*decoded(data, 12, "squash")]) == 40
    assert torch.equal(torch.get_rng_state(), before)


def test_store_that_does_not_fit_the_disk_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="store of toy needs"):
        open_store(dataset_of([0, 1], [False, True], picture), 32, "squash", tmp_path)


def cut_off(store: Path) -> str:
    pixels = (store / "pixels").read_bytes()
    (store / "pixels").write_bytes(pixels[:-1])
    return "its file of pixels is cut off"


def flip_a_bit(store: Path) -> str:
    pixels = bytearray((store / "pixels").read_bytes())
    pixels[3 * 12 * 12 + 7] ^= 1  # in the second image
    (store / "pixels").write_bytes(pixels)
    return "checksums are wrong: image1"


def lose_sizes(store: Path) -> str:
    (store / "sizes").unlink()
    return "there is no sizes"


def break_description(store: Path) -> str:
    (store / "store.json").write_text("{")
    return "JSONDecodeError"


def of_other_images(store: Path) -> str:
    made = json.loads((store / "store.json").read_text())
    (store / "store.json").write_text(json.dumps(made | {"fingerprint": "another"}))
    return "it holds other images"


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, lose_sizes, break_description, of_other_images])
def test_a_damaged_store_is_named_and_built_again(tmp_path, damage, capsys):
    data = dataset_of([0, 1, 1], [False, True, True], picture)
    expected = np.array(open_store(data, 12, "squash", tmp_path).pixels)
    why = damage(store_path(data, 12, "squash", tmp_path))
    assert (open_store(data, 12, "squash", tmp_path).pixels == expected).all()
    message = capsys.readouterr().out
    assert f"{store_path(data, 12, 'squash', tmp_path)} is damaged" in message and why in message
    open_store(data, 12, "squash", tmp_path)
    assert not capsys.readouterr().out


def test_a_store_that_was_copied_is_checked_once(tmp_path, monkeypatch):
    data = dataset_of([0, 1], [False, True], lambda i: pytest.fail("decoded again") if copied else picture(i))
    copied = False
    pixels = np.array(open_store(data, 12, "squash", tmp_path / "a").pixels)
    copied = True
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    open_store(data, 12, "squash", tmp_path / "b")
    monkeypatch.setattr("delta_transfer.data.store.wrong_checksums", lambda path: pytest.fail("checked again"))
    assert (open_store(data, 12, "squash", tmp_path / "b").pixels == pixels).all()


def test_images_that_change_while_they_are_decoded_are_named(tmp_path):
    data = from_files("toy", files_of(tmp_path, 40), ["a", "b"], NAMES[:40], [0, 1] * 20, [False, True] * 20, "a list")

    def change(done: int) -> None:
        if done == 20:
            picture(99).save(tmp_path / NAMES[3])

    with pytest.raises(UserError, match=f"1 images of toy changed while they were decoded: {NAMES[3]}"):
        open_store(data, 12, "squash", tmp_path / "cache", change)
    assert not list((tmp_path / "cache" / "stores").iterdir())


# --- digests of files ---

NAMES = [f"image{index:02}.png" for index in range(40)]


def files_of(folder: Path, count: int) -> Path:
    for index in range(count):
        picture(index).save(folder / NAMES[index])
    return folder


def toy(folder: Path, cache_dir: Path | None = None) -> Dataset:
    data = from_files("toy", folder, ["a", "b"], NAMES[:4], [0, 1] * 2, [False, True] * 2, "a list")
    return replace(data, cache_dir=cache_dir)


def test_fingerprint_is_over_the_bytes_wherever_they_lie(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        files_of(tmp_path / name, 4)
    first = toy(tmp_path / "a").fingerprint
    assert first == toy(tmp_path / "b").fingerprint
    data = bytearray((tmp_path / "b" / NAMES[2]).read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / NAMES[2]).write_bytes(data)
    assert first != toy(tmp_path / "b").fingerprint
    assert toy(tmp_path / "a").listing == toy(tmp_path / "b").listing  # names and sizes are the same


def test_files_are_read_once_and_again_when_they_changed(tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    cache.mkdir()
    files_of(tmp_path, 4)
    read = []
    whole = contents._read
    monkeypatch.setattr(contents, "_read", lambda path: read.append(path.name) or whole(path))
    first = toy(tmp_path, cache).fingerprint
    assert sorted(read) == NAMES[:4]
    assert toy(tmp_path, cache).fingerprint == first and len(read) == 4
    os.utime(tmp_path / NAMES[1], (1, 1))  # the time, not the bytes
    assert toy(tmp_path, cache).fingerprint == first and read[4:] == [NAMES[1]]
    assert not capsys.readouterr().out
    picture(50).save(tmp_path / NAMES[2])
    assert toy(tmp_path, cache).fingerprint != first and read[5:] == [NAMES[2]]
    assert f"toy: 1 images changed ({NAMES[2]})" in capsys.readouterr().out
    (file,) = (cache / "digests").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert toy(tmp_path, cache).fingerprint != first and len(read) == 10  # damaged: all are read again
    shutil.rmtree(cache)
    toy(tmp_path, cache).fingerprint  # noqa: B018
    assert not cache.exists()  # a dry run makes no folder


def test_two_files_that_change_places_are_another_data_set(tmp_path):
    """Bitmaps of one size that an archive gave one time: only the time of their status tells."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for number, name in enumerate(NAMES[:4]):
        picture(number).save(tmp_path / name, format="BMP")
        os.utime(tmp_path / name, (1, 1))
    first = toy(tmp_path, cache).fingerprint
    (tmp_path / NAMES[0]).rename(tmp_path / "third")
    (tmp_path / NAMES[1]).rename(tmp_path / NAMES[0])
    (tmp_path / "third").rename(tmp_path / NAMES[1])
    assert toy(tmp_path, cache).fingerprint != first


# --- batches ---


def test_memory_that_pytorch_holds_for_reuse_is_free(monkeypatch):
    """A second run of a sweep finds the first one's memory there, and keeps its store on the GPU, too."""
    for name, found in {"mem_get_info": (100, 1000), "memory_reserved": 700, "memory_allocated": 50}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert free_memory(torch.device("cuda")) == 100 + 650


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def loader_of(count=10, size=8, crop=5, batch_size=4, seed=0, sizes=None, mirror=True, **views) -> Loader:
    sizes = np.array(sizes or [(size, size)] * count)
    pixels = np.random.default_rng(0).integers(0, 256, (sizes.prod(axis=1).sum(), 3), dtype=np.uint8)
    return Loader(
        Store(pixels, sizes),
        np.arange(len(sizes)),
        crop=crop,
        mirror=mirror,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
        seed=seed,
        device=torch.device("cpu"),
        **views,
    )


def images_of(loader: Loader) -> list[np.ndarray]:
    """The stored images, each (H, W, 3) uint8."""
    sizes = np.stack([loader.heights, loader.widths], axis=1)
    return [image_of(Store(loader.pixels.numpy(), sizes), i) for i in range(len(sizes))]


def plain(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W), normalised as torchvision does."""
    return ((torch.from_numpy(pixels.copy()).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


@pytest.mark.parametrize(("size", "corner"), [(9, 2), (8, 2), (10, 2), (12, 4)])  # a half is rounded to even
def test_centre_crop_is_torchvisions(size, corner, monkeypatch):
    monkeypatch.setattr("delta_transfer.data.loader.images_at_once", lambda device, size: 4)
    loader = loader_of(size=size, crop=5)
    images, labels = zip(*loader.test_batches(np.arange(10)), strict=True)
    assert [len(batch) for batch in images] == [4, 4, 2]
    assert torch.cat(labels).tolist() == list(range(10))
    for stored, image in zip(images_of(loader), torch.cat(images), strict=True):
        torch.testing.assert_close(image, plain(stored[corner : corner + 5, corner : corner + 5]))
        torch.testing.assert_close(image, plain(np.asarray(transforms.CenterCrop(5)(Image.fromarray(stored)))))


SIZES = [(8, 8), (8, 13), (14, 8), (9, 8), (8, 8)]


@pytest.mark.parametrize("at_once", [4, 25, 1000])
def test_ten_crops_are_torchvisions(at_once, monkeypatch):
    monkeypatch.setattr("delta_transfer.data.loader.images_at_once", lambda device, size: at_once)
    loader = loader_of(sizes=SIZES, crop=5, ten_crops=True)
    order = np.array([3, 0, 1, 4, 2])
    images, labels = zip(*loader.test_batches(order), strict=True)
    assert all(len(batch) == at_once for batch in images[:-1])
    assert torch.cat(labels).tolist() == order.repeat(10).tolist()
    stored = images_of(loader)
    expected = [plain(np.asarray(crop)) for i in order for crop in transforms.TenCrop(5)(Image.fromarray(stored[i]))]
    torch.testing.assert_close(torch.cat(images), torch.stack(expected))


def test_five_crops_where_mirror_images_mean_something_else():
    loader = loader_of(sizes=SIZES, crop=5, mirror=False, ten_crops=True)
    images = torch.cat([images for images, _ in loader.test_batches(np.arange(5))])
    expected = [plain(np.asarray(c)) for i in images_of(loader) for c in transforms.FiveCrop(5)(Image.fromarray(i))]
    torch.testing.assert_close(images, torch.stack(expected))


def test_one_gather_is_the_same_as_slices():
    loader = loader_of(sizes=SIZES, crop=5)
    rows, columns = np.array([0, 3, 9, 4, 1]), np.array([3, 8, 2, 0, 1])
    arguments = np.arange(5), loader._square(rows, columns), np.array([True, False, True, False, True])
    assert torch.equal(loader._gathered(*arguments), loader._sliced(*arguments))


def test_random_crops_reach_the_whole_of_an_image_that_is_not_square():
    loader = loader_of(sizes=[(5, 11)], crop=5, batch_size=8)
    seen = {tuple(image[0, 0].tolist()) for i in range(30) for image in loader.train_batch(np.arange(1), i)[0]}
    (stored,) = images_of(loader)
    columns = [plain(stored[:, c : c + 5][:, ::flip])[0, 0] for c in range(7) for flip in (1, -1)]
    assert len(seen) == len(columns) == 14


def test_random_boxes_are_drawn_as_published():
    heights, widths = np.full(4000, 300), np.full(4000, 400)
    row, column, height, width = random_boxes(np.random.default_rng(0), heights, widths, 0.2)
    assert (row >= 0).all() and (row + height <= 300).all() and (column >= 0).all() and (column + width <= 400).all()
    area, ratio = height * width / (300 * 400), width / height
    assert 0.19 < area.min() < 0.21 and area.max() > 0.9
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35
    # torchvision's own draws have the same mean area and shape (standard errors of 4,000 draws: 0.0035, 0.0026).
    drawn = [
        transforms.RandomResizedCrop.get_params(torch.zeros(3, 300, 400), (0.2, 1.0), (3 / 4, 4 / 3))
        for _ in range(4000)
    ]
    assert abs(area.mean() - np.mean([h * w / 120000 for *_, h, w in drawn])) < 0.02
    assert abs(np.log(ratio).mean() - np.mean([np.log(w / h) for *_, h, w in drawn])) < 0.02


@pytest.mark.parametrize(("shape", "expected"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))])
def test_random_box_that_never_fits_is_the_largest_centred_one(shape, expected):
    box = random_boxes(np.random.default_rng(0), *np.array(shape)[:, None], min_area=0.99)
    assert tuple(box[:, 0]) == expected


def test_random_resized_crops_are_resized_as_pillow_does():
    loader = loader_of(sizes=[(40, 50)], crop=16, mirror=False, batch_size=1, min_crop_area=0.5)
    random = np.random.default_rng((0, 0, 1, 0))  # seed, stream, purpose, iteration
    ((row, column, height, width),) = random_boxes(random, np.array([40]), np.array([50]), 0.5).T
    image, _ = loader.train_batch(np.arange(1), 0)
    box = Image.fromarray(images_of(loader)[0][row : row + height, column : column + width])
    expected = plain(np.asarray(box.resize((16, 16), Image.Resampling.BILINEAR)))
    assert (image[0] - expected).abs().max() < 1.01 / 255 / min(STD)  # one grey level


def test_training_images_are_crops_or_mirrored_crops_of_their_source():
    loader = loader_of(size=8, crop=5)
    store = np.array(images_of(loader))
    seen = set()
    for iteration in range(60):
        images, labels = loader.train_batch(np.arange(10), iteration)
        assert images.shape == (4, 3, 5, 5) and images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip(images, labels.tolist(), strict=True):
            found = [
                (row, column, flip)
                for row in range(4)
                for column in range(4)
                for flip in (1, -1)
                if torch.allclose(image, plain(store[label, row : row + 5, column : column + 5][:, ::flip]), atol=1e-5)
            ]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) == 32  # every corner, mirrored and not


def test_padded_images_are_cropped_as_torchvision_crops_them():
    """transforms.RandomCrop(5, padding=2) of an image of 5 x 6: every place that it can cut, and nothing else."""
    loader = loader_of(sizes=[(5, 6)], crop=5, pad=2, mirror=False, batch_size=8)
    padded = np.pad(images_of(loader)[0], ((2, 2), (2, 2), (0, 0)))
    expected = {
        (row, column): plain(padded[row : row + 5, column : column + 5]) for row in range(5) for column in range(6)
    }
    seen = set()
    for iteration in range(40):
        for image in loader.train_batch(np.arange(1), iteration)[0]:
            (found,) = (place for place, crop in expected.items() if torch.allclose(image, crop, atol=1e-5))
            seen.add(found)
    assert seen == expected.keys()
    (image,), _ = next(iter(loader.test_batches(np.arange(1))))
    torch.testing.assert_close(image, plain(images_of(loader)[0][:, :5]))  # tests are of the image as it is


def test_crops_gathered_at_once_are_those_cut_one_by_one():
    """What a GPU does and what a CPU does."""
    for pad in (0, 3):
        loader = loader_of(sizes=[(7, 9), (8, 6), (6, 6)], crop=5, pad=pad, batch_size=32)
        drawn = loader._drawn(np.arange(3), 0, "train", 0)
        assert torch.equal(loader._gathered(*drawn), loader._sliced(*drawn))


def test_without_mirroring():
    images, labels = loader_of(size=5, crop=5, mirror=False).train_batch(np.arange(10), 0)
    store = images_of(loader_of(size=5, crop=5))
    for image, label in zip(images, labels.tolist(), strict=True):
        torch.testing.assert_close(image, plain(store[label]))


def test_every_pass_sees_every_image_once_in_full_batches():
    loader = loader_of(batch_size=4)
    indices = np.array([1, 3, 5, 7, 8, 9])
    labels = torch.cat([loader.train_batch(indices, i)[1] for i in range(6)]).tolist()  # 24 = four passes of six
    passes = [labels[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(p) == indices.tolist() for p in passes)
    assert len({tuple(p) for p in passes}) > 1


def test_batches_follow_from_seed_and_iteration_alone():
    indices = np.arange(10)
    one, other = loader_of(), loader_of()
    other.train_batch(indices, 0)
    assert all(map(torch.equal, one.train_batch(indices, 7), other.train_batch(indices, 7)))
    assert not torch.equal(one.train_batch(indices, 7)[0], loader_of(seed=1).train_batch(indices, 7)[0])
    first_of_fit = next(iter(one.passes(indices, "fit", seed=one.seed)))
    assert not torch.equal(one.train_batch(indices, 0)[0], first_of_fit[0])


def test_processes_share_a_batch():
    whole, *shares = (loader_of(share=share) for share in (slice(None), slice(0, None, 2), slice(1, None, 2)))
    images, labels = whole.train_batch(np.arange(10), 3)
    for number, loader in enumerate(shares):
        own_images, own_labels = loader.train_batch(np.arange(10), 3)
        assert torch.equal(own_images, images[number::2]) and torch.equal(own_labels, labels[number::2])
        # What is computed before training sees all of them, and dropout differs.
        batches = zip(loader.passes(np.arange(10), "fit", 0), whole.passes(np.arange(10), "fit", 0), strict=True)
        assert all(torch.equal(one[0], other[0]) for one, other in batches)
    assert whole.step_seed(3) == shares[0].step_seed(3) != shares[1].step_seed(3)


def test_passes_go_on_where_the_last_one_ended():
    loader = loader_of(batch_size=4)
    passes = loader.passes(np.arange(10), "fit", seed=3)
    first, second = ([labels.tolist() for _, labels in passes] for _ in range(2))
    assert len(first) == len(passes) == 3
    assert first != second
    other = [labels.tolist() for _, labels in loader.passes(np.arange(10), "fit", seed=4)]
    assert other != first


def test_batch_larger_than_the_data():
    images, labels = loader_of(count=3, batch_size=8).train_batch(np.arange(3), 0)
    assert len(images) == 8 and set(labels.tolist()) == {0, 1, 2}

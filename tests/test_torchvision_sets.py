"""Data sets that torchvision has classes for: what is read from miniature trees, and what a person is told."""

import io
import os
import pickle
import tarfile
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from delta_transfer.common.errors import UserError
from delta_transfer.data import Publication, fetch, publication

from .test_readers import options_of, read
from .torchvision_trees import ARRAYS, WRITERS, Tree, accept_checksums, save_annotations, write_food101

FILES = [name for name in WRITERS if name not in ARRAYS]
FETCHED = [name for name in WRITERS if name != "cars"]


@pytest.fixture
def tree_of(tmp_path, monkeypatch):
    """The miniature tree of a data set, with checksums that torchvision accepts."""

    def write(name: str) -> Tree:
        tree = WRITERS[name](tmp_path / "data")
        accept_checksums(monkeypatch, tree)
        return tree

    return write


def published(name: str) -> Publication:
    return publication(options_of(name))


def check(data, tree: Tree) -> None:
    assert data.classes == tuple(tree.classes)
    assert data.names == tuple(tree.names)
    assert data.labels.tolist() == tree.labels
    assert data.is_test.tolist() == tree.is_test
    tolerance = 0 if data.name in ARRAYS else 4  # JPEG changes colours a little; those of two images differ by more
    for index, expected in enumerate(tree.pixels):
        image = data.load(index)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("name", WRITERS)
def test_lists_labels_and_pixels(tree_of, name):
    tree = tree_of(name)
    data = read(name, tree.root)
    assert data.name == name
    check(data, tree)


@pytest.mark.parametrize("name", FILES)
def test_no_image_is_decoded_to_read_the_lists(tree_of, name):
    tree = tree_of(name)
    for file in tree.names:
        (tree.root / tree.folder / file).write_bytes(b"no image")
    assert read(name, tree.root).names == tuple(tree.names)


def test_dtd_reads_the_chosen_partition(tree_of):
    tree = tree_of("dtd")
    first, second = read("dtd", tree.root), read("dtd", tree.root, "dataset.partition=2")
    test = [name for name, is_test in zip(first.names, first.is_test, strict=True) if is_test]
    assert list(second.names[: len(test)]) == test and not second.is_test[: len(test)].any()
    assert sorted(second.names) == sorted(first.names)
    with pytest.raises(UserError, match="train3.txt"):
        read("dtd", tree.root, "dataset.partition=3")


@pytest.mark.parametrize("name", WRITERS)
def test_the_data_sets_own_folder_is_accepted_as_root(tree_of, monkeypatch, name):
    tree = tree_of(name)
    check(read(name, tree.root / tree.folder), tree)
    monkeypatch.chdir(tree.root / tree.folder)
    check(read(name, Path(".")), tree)
    check(read(name, Path("..")), tree)


def test_stl10_does_not_open_the_unlabelled_images(tree_of):
    tree = tree_of("stl10")
    assert not (tree.root / "stl10_binary/unlabeled_X.bin").exists()
    assert len(read("stl10", tree.root).labels) == 7


# --- what is wrong ---


@pytest.mark.parametrize("name", WRITERS)
def test_a_missing_data_set_is_told_with_the_way_to_get_it(tmp_path, name):
    way = "dataset.download=true" if name in FETCHED else "ai.stanford.edu no longer serves"
    for root in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=way) as told:
            read(name, root)
        assert str(root) in str(told.value) and published(name).needs[0] in str(told.value)


def test_other_sets_below_the_same_root_are_no_hint(tree_of):
    tree = tree_of("food101")
    with pytest.raises(UserError) as told:
        read("pets", tree.root)
    assert "Food-101" not in str(told.value)


@pytest.mark.parametrize("name", FILES)
def test_missing_images_are_named(tree_of, name):
    tree = tree_of(name)
    (tree.root / tree.folder / tree.names[3]).unlink()
    with pytest.raises(UserError, match=f"1 of {len(tree.names)} images") as told:
        read(name, tree.root)
    assert tree.names[3] in str(told.value)


@pytest.mark.parametrize(
    ("name", "file", "content", "expected"),
    [
        ("pets", "annotations/test.txt", "# image class\n", "ValueError"),
        ("pets", "annotations/test.txt", None, "FileNotFoundError"),
        ("cars", "cars_test_annos_withlabels.mat", "not MATLAB", "Unknown mat file type|MatReadError"),
        ("cars", "devkit/cars_train_annos.mat", "", "MatReadError"),
        ("flowers102", "setid.mat", "", "compares checksums"),
        ("cifar10", "data_batch_3", "", "compares checksums"),
        ("cifar100", "meta", "", "compares checksums"),
        ("stl10", "test_y.bin", "", "compares checksums"),
        ("stl10", "train_y.bin", None, "compares checksums"),
    ],
)
def test_damaged_lists_are_told(tree_of, name, file, content, expected):
    tree = tree_of(name)
    path = tree.root / tree.folder / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=expected) as told:
        read(name, tree.root)
    assert f"{name} in {tree.root} cannot be read" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "file", "content", "expected"),
    [
        ("food101", "meta/test.json", "{", "line 1"),
        ("food101", "meta/test.json", "[1]", "JSON"),
        ("food101", "meta/test.json", '{"apple_pie": [1]}', "JSON"),
        ("food101", "meta/test.json", '{"apple_pie": ["zabaione/1"]}', "entry 1: .*(apple_pie|zabaione)"),
        ("food101", "meta/test.json", '{"zabaione": ["zabaione/1"]}', "entry 1: .*train.json .*zabaione"),
        ("dtd", "dtd/labels/val1.txt", "banded_0003.jpg\n", "entry 1: .*{class}/{file}.*banded_0003.jpg"),
        ("aircraft", "data/images_variant_test.txt", "0000001 Zeppelin\n", "entry 1: .*variants.txt .*Zeppelin"),
    ],
)
def test_wrong_lines_are_told(tree_of, name, file, content, expected):
    tree = tree_of(name)
    path = tree.root / tree.folder / file
    path.write_text(content)
    with pytest.raises(UserError, match=expected) as told:
        read(name, tree.root)
    assert str(path) in str(told.value)


def test_a_truncated_mat_file_is_told(tree_of):
    path = tree_of("cars").root / "stanford_cars/devkit/cars_train_annos.mat"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="cars in .* cannot be read"):
        read("cars", path.parents[2])


def test_a_changed_pickle_is_not_opened(tree_of):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tree.root / "sprung"),)

    tree = tree_of("cifar10")
    for file in ("data_batch_1", "test_batch", "batches.meta"):
        intact = (tree.root / tree.folder / file).read_bytes()
        (tree.root / tree.folder / file).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(UserError, match="compares checksums.*dataset.download=true"):
            read("cifar10", tree.root)
        (tree.root / tree.folder / file).write_bytes(intact)
    assert not (tree.root / "sprung").exists()
    check(read("cifar10", tree.root), tree)


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_without_a_class_are_told(tree_of, label):
    tree = tree_of("cars")
    path = tree.root / "stanford_cars/cars_test_annos_withlabels.mat"
    save_annotations(path, [("00001.jpg", 0), ("00002.jpg", label)])
    with pytest.raises(UserError, match=r"labels must be in 0\.\.2, but cars_test/00002.jpg"):
        read("cars", tree.root)


@pytest.mark.parametrize("outside", ["../../secret", "/etc/secret"])
def test_a_list_cannot_name_files_outside_the_data_set(tree_of, outside):
    tree = tree_of("aircraft")
    (tree.root / "fgvc-aircraft-2013b/data/images_variant_test.txt").write_text(f"{outside} F/A-18\n")
    with pytest.raises(UserError, match="secret.jpg"):
        read("aircraft", tree.root)


# --- dataset.download=true ---


class Web:
    """Stands in for urllib.request.urlopen: answers with `content`, or with an error while there is none."""

    def __init__(self):
        self.content, self.asked = None, []

    def __call__(self, request):
        self.asked.append(request.full_url)
        if self.content is None:
            raise URLError("no route to host\nsecond line")
        answer = io.BytesIO(self.content)
        answer.url, answer.length = request.full_url, len(self.content)
        return answer


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", web := Web())
    return web


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("food101", "food-101.tar.gz"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("dtd", "dtd-r1.0.1.tar.gz"),
        ("aircraft", "fgvc-aircraft-2013b.tar.gz"),
        ("pets", "images.tar.gz"),
        ("flowers102", "102flowers.tgz"),
        ("stl10", "stl10_binary.tar.gz"),
    ],
)
def test_a_failed_download_is_told(tmp_path, web, name, archive):
    with pytest.raises(UserError, match="could not fetch .*no route to host") as told:
        read(name, tmp_path, "dataset.download=true")
    assert web.asked and web.asked[0].endswith(archive)
    assert str(tmp_path) in str(told.value) and "second line" not in str(told.value)
    assert published(name).title in str(told.value) and published(name).source in str(told.value)


def test_a_download_with_the_wrong_checksum_is_told(tmp_path, web):
    web.content = b"a login page"
    with pytest.raises(UserError, match="could not fetch Food-101 .*corrupted"):
        read("food101", tmp_path, "dataset.download=true")


def test_a_download_is_unpacked_and_read(tmp_path, web):
    tree = WRITERS["aircraft"](tmp_path / "publisher")  # torchvision knows no checksum of this one
    with tarfile.open(tmp_path / "archive.tgz", "w:gz") as archive:
        archive.add(tree.root / tree.folder, tree.folder)
    web.content = (tmp_path / "archive.tgz").read_bytes()
    check(read("aircraft", tmp_path / "new", "dataset.download=true"), tree)


@pytest.mark.parametrize("name", FETCHED)
@pytest.mark.parametrize("own_folder", [False, True])
def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch, web, name, own_folder):
    tree = WRITERS[name](tmp_path / "data")
    (tree.root / tree.folder / "unlabeled_X.bin").touch()  # STL-10's download looks for it
    accept_checksums(monkeypatch, tree)
    check(read(name, tree.root / tree.folder if own_folder else tree.root, "dataset.download=true"), tree)
    assert not web.asked


def test_a_download_needs_a_place_and_a_publisher(tmp_path, web):
    with pytest.raises(UserError, match="needs dataset.root=DIR"):
        read("food101", None, "dataset.download=true")
    with pytest.raises(UserError, match="Stanford Cars has no download: Get cars_train.tgz"):
        read("cars", tmp_path, "dataset.download=true")
    assert not web.asked


def test_a_set_that_is_fetched_incomplete_is_told(tmp_path, web):
    tree = write_food101(tmp_path)
    (tree.root / "food-101/meta/train.json").unlink()
    with pytest.raises(UserError, match="Food-101.*FileNotFoundError"):
        read("food101", tmp_path, "dataset.download=true")


def test_a_sweep_fetches_once_and_tries_again_after_a_failure(tmp_path):
    calls, online = [], []

    def download(root):
        calls.append(root)
        if not online:
            raise OSError("no network")

    toy = Publication("toy", download=download)
    with pytest.raises(UserError, match="no network"):
        fetch(toy, tmp_path)
    online.append(True)
    fetch(toy, tmp_path)
    fetch(toy, tmp_path)
    assert calls == [tmp_path] * 2

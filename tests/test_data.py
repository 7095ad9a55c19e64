"""Draws and splits, store, batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from delta_transfer.config import DatasetConfig, SplitConfig
from delta_transfer.data.dataset import Dataset, split_parts
from delta_transfer.data.loader import Loader
from delta_transfer.data.store import open_store
from delta_transfer.errors import UserError


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
    first = split_parts(data, DatasetConfig(images_per_class=4), SplitConfig())
    assert np.bincount(data.labels[first.train]).tolist() == [4, 4, 4]
    assert not data.is_test[first.train].any() and data.is_test[first.test].all() and len(first.test) == 6
    again = split_parts(data, DatasetConfig(images_per_class=4), SplitConfig())
    other = split_parts(data, DatasetConfig(images_per_class=4, subset_seed=1), SplitConfig())
    assert first.train.tolist() == again.train.tolist() != other.train.tolist()


def test_smaller_draws_are_part_of_larger_ones():
    data = balanced(10)
    small, large = (split_parts(data, DatasetConfig(images_per_class=n), SplitConfig()).train.tolist() for n in (3, 7))
    assert set(small) < set(large)


@pytest.mark.parametrize(("rate", "expected"), [(0.15, 2), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_sample_rate_rounds_up(rate, expected):
    data = balanced(10)
    parts = split_parts(data, DatasetConfig(sample_rate=rate), SplitConfig())
    assert np.bincount(data.labels[parts.train]).tolist() == [expected] * 3


def test_validation_part_is_stratified_and_disjoint_from_train_and_test():
    data = balanced(10)
    parts = split_parts(data, DatasetConfig(), SplitConfig(val_fraction=0.3))
    assert np.bincount(data.labels[parts.val]).tolist() == [3, 3, 3]
    assert sorted([*parts.train, *parts.val]) == np.flatnonzero(~data.is_test).tolist()


def test_folds_cover_the_training_part_once():
    data = balanced(10)
    folds = [split_parts(data, DatasetConfig(), SplitConfig(folds=3, fold=k)) for k in range(3)]
    assert sorted(np.concatenate([f.val for f in folds])) == np.flatnonzero(~data.is_test).tolist()
    assert all(not set(f.val) & set(f.train) for f in folds)


def test_the_draw_does_not_depend_on_the_split():
    data = balanced(10)
    draw = DatasetConfig(images_per_class=5)
    whole = split_parts(data, draw, SplitConfig())
    cut = split_parts(data, draw, SplitConfig(val_fraction=0.4))
    assert sorted([*cut.train, *cut.val]) == whole.train.tolist()


def test_class_without_training_images_is_named():
    with pytest.raises(UserError, match="class1"):
        split_parts(dataset_of([0, 0, 1], [False, True, True]), DatasetConfig(), SplitConfig())


def test_fingerprint_of_the_parts():
    data = balanced(10)
    prints = {
        split_parts(data, DatasetConfig(images_per_class=n), SplitConfig(val_fraction=v)).fingerprint(data)
        for n, v in ((4, 0.0), (5, 0.0), (4, 0.25))
    }
    assert len(prints) == 3


# --- store ---


def test_store_holds_resized_images_and_is_built_once(tmp_path):
    calls = []

    def load(index: int) -> Image.Image:
        calls.append(index)
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8))

    data = dataset_of([0, 0, 1, 1], [False, True] * 2, load)
    store = open_store(data, 12, tmp_path)
    assert store.shape == (4, 12, 12, 3) and store.dtype == np.uint8
    for index in range(4):
        expected = np.asarray(load(index).resize((12, 12), Image.Resampling.BILINEAR))
        assert (store[index] == expected).all()
    calls.clear()
    assert (open_store(data, 12, tmp_path) == store).all() and not calls
    open_store(data, 10, tmp_path)
    assert sorted(calls) == [0, 1, 2, 3]
    assert len(list((tmp_path / "stores").iterdir())) == 2  # nothing unfinished lies about


# --- batches ---

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def loader_of(count=10, size=8, crop=5, batch_size=4, seed=0, mirror=True) -> Loader:
    store = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    labels = np.arange(count)
    return Loader(
        store,
        labels,
        crop=crop,
        mirror=mirror,
        mean=MEAN,
        std=STD,
        batch_size=batch_size,
        seed=seed,
        device=torch.device("cpu"),
    )


def plain(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W), normalised as torchvision does."""
    return ((torch.from_numpy(pixels.copy()).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def test_centre_crop():
    loader = loader_of(size=9, crop=5, batch_size=4)
    images, labels = zip(*loader.centre_batches(np.arange(10)), strict=True)
    assert [len(batch) for batch in images] == [4, 4, 2]
    assert torch.cat(labels).tolist() == list(range(10))
    store = loader.images.numpy()
    for i, image in enumerate(torch.cat(images)):
        torch.testing.assert_close(image, plain(store[i, 2:7, 2:7]))


def test_training_images_are_crops_or_mirrored_crops_of_their_source():
    loader = loader_of(size=8, crop=5)
    store = loader.images.numpy()
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


def test_without_mirroring():
    images, labels = loader_of(size=5, crop=5, mirror=False).train_batch(np.arange(10), 0)
    store = loader_of(size=5, crop=5).images.numpy()
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
    assert not torch.equal(one.train_batch(indices, 7)[0], one.train_batch(indices, 7, stream="fit")[0])


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

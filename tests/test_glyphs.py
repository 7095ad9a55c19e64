import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml

from delta_transfer.common.errors import UserError
from delta_transfer.data.embedded.glyphs import FACES, SCRIPTS, _covers, glyphs, letter_shapes

from .miniature import CONF

SOURCE = tuple(yaml.safe_load((CONF / "dataset/glyphs_source.yaml").read_text())["scripts"])
SMALL = dict(scripts=("georgian",), train_per_class=3, test_per_class=2, size=36, seed=0)


def pixels(dataset, indices=range(40)):
    return np.stack([np.asarray(dataset.load(i)) for i in indices])


def class_of(character, shapes):
    (index,) = (k for k, shape in enumerate(shapes) if character in shape)
    return index


# the data set


def test_counts_and_split():
    data = glyphs(**SMALL)
    assert len(data.classes) == 33
    assert len(data.labels) == len(data.is_test) == len(set(data.names)) == 33 * (3 + 2)
    assert data.labels.dtype == np.int64 and data.is_test.dtype == bool
    assert (np.bincount(data.labels[data.is_test]) == 2).all()
    assert (np.bincount(data.labels[~data.is_test]) == 3).all()
    image = data.load(0)
    assert image.mode == "RGB" and image.size == (36, 36)


@pytest.mark.parametrize("size", [8, 33, 64])
def test_other_sizes(size):
    data = glyphs(**SMALL | {"size": size})
    assert pixels(data, range(5)).shape == (5, size, size, 3)


def test_same_arguments_same_pixels():
    assert (pixels(glyphs(**SMALL)) == pixels(glyphs(**SMALL))).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"scripts": ("armenian",)}])
def test_other_seed_or_script_other_pixels(change):
    ours, theirs = pixels(glyphs(**SMALL)), pixels(glyphs(**SMALL | change))
    assert all((a != b).any() for a, b in zip(ours, theirs, strict=True))


def test_no_two_images_are_equal():
    data = glyphs(**SMALL)
    assert len({data.load(i).tobytes() for i in range(len(data.labels))}) == len(data.labels)


def test_image_is_independent_of_the_others():
    """In any order, from many threads, after pickling: the same pixels."""
    expected = pixels(glyphs(**SMALL), range(80))
    data = glyphs(**SMALL)
    assert (pixels(data, reversed(range(80)))[::-1] == expected).all()
    with ThreadPoolExecutor(8) as pool:
        assert (np.stack([np.asarray(image) for image in pool.map(data.load, range(80))]) == expected).all()
    assert (pixels(pickle.loads(pickle.dumps(data)), range(80)) == expected).all()


def test_more_training_images_change_no_earlier_one():
    small, large = glyphs(**SMALL), glyphs(**SMALL | {"train_per_class": 5})
    assert large.names[: len(small.names)] == small.names
    assert (pixels(large, range(0, 165, 7)) == pixels(small, range(0, 165, 7))).all()


def test_letter_stays_inside_the_crop():
    """The outermost ring shows paper and stray strokes only."""
    images = pixels(glyphs(**SMALL | {"train_per_class": 10}), range(330)).astype(float).mean(axis=3)
    paper = np.median(images, axis=(1, 2), keepdims=True)
    ink = (np.abs(images - paper) > 50).mean(axis=0)
    ring = np.ones_like(ink, bool)
    ring[1:-1, 1:-1] = False
    assert ink[ring].mean() < 0.5 * ink[12:24, 12:24].mean()


# the classes


def test_source_and_target_share_no_class():
    source = set("".join(letter_shapes("".join(SCRIPTS[s] for s in SOURCE))))
    for target in ("georgian", "armenian"):
        assert source.isdisjoint("".join(letter_shapes(SCRIPTS[target])))


def test_georgian_looks_like_no_source_letter():
    """Not only other code points: no Georgian letter looks like a source letter (Armenian ones do)."""
    shapes = letter_shapes("".join(SCRIPTS[s] for s in (*SOURCE, "georgian")))
    assert all(shape in shapes for shape in SCRIPTS["georgian"])


@pytest.mark.parametrize(
    "alike",
    ["A\u0391\u0410", "O\u039f\u041eo\u03bf\u043e", "cC\u0441", "sS", "vV", "wW", "xX\u03a7", "zZ", "Il"],
)
def test_homoglyphs_are_one_class(alike):
    shapes = letter_shapes("".join(SCRIPTS[s] for s in SOURCE))
    assert len({class_of(c, shapes) for c in alike}) == 1


@pytest.mark.parametrize("pair", ["EF", "O\u0398", "\u039b\u0394", "A\u039b", "bd", "hn", "\u0418\u0419", "il", "OQ"])
def test_letters_that_differ_are_not(pair):
    shapes = letter_shapes("".join(SCRIPTS[s] for s in SOURCE))
    assert class_of(pair[0], shapes) != class_of(pair[1], shapes)


def test_every_character_is_in_one_class_and_some_face():
    characters = "".join(SCRIPTS[s] for s in SOURCE)
    assert sorted("".join(letter_shapes(characters))) == sorted(characters)
    assert all(any(_covers(face, c) for face in FACES) for script in SCRIPTS.values() for c in script)
    assert not _covers("STIXGeneral", "\u10d0")  # Georgian an: would be drawn as an empty box


# fingerprint, bad input


def test_fingerprint_follows_every_parameter(monkeypatch):
    changes = [
        {},
        {"scripts": ("armenian",)},
        {"scripts": ("georgian", "armenian")},
        {"train_per_class": 4},
        {"test_per_class": 3},
        {"size": 40},
        {"seed": 1},
    ]
    prints = [glyphs(**SMALL | change).fingerprint for change in changes]
    # sys.modules: the package delta_transfer.data exports the function under the module's name.
    monkeypatch.setattr(sys.modules["delta_transfer.data.embedded.glyphs"], "RENDERER", -1)
    prints.append(glyphs(**SMALL).fingerprint)
    assert len(set(prints)) == len(changes) + 1
    assert all(len(p) == 64 for p in prints)


def test_fingerprint_is_stable():
    assert glyphs(**SMALL).fingerprint == glyphs(**SMALL | {"scripts": ["georgian"]}).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scripts": ("klingon",)}, "unknown script 'klingon'"),
        ({"scripts": ()}, "one script or more"),
        ({"scripts": ("latin", "latin")}, "none twice"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(UserError, match=message):
        glyphs(**SMALL | change)

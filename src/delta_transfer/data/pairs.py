"""Data sets for verification: classes to train on, and pairs of images of other classes to test on."""

import hashlib
import unicodedata

import numpy as np
from PIL import Image

from ..common.console import shorten_list
from ..common.errors import UserError
from .dataset import Dataset, Pairs


def with_pairs(name: str, train: Dataset, test: Dataset, pairs: Pairs) -> Dataset:
    """The images of `train`, then those of `test`, into which `pairs` are indices.

    Raises UserError for a class in both, since pairs of a trained class verify nothing. Names are compared by letters
    and digits, whatever the case: George_W_Bush is "george w bush".
    """
    trained = {_spelling(known) for known in train.classes}
    if shared := [known for known in test.classes if _spelling(known) in trained]:
        raise UserError(
            f"{name}: the training images show {len(shared)} persons or classes of the pairs: "
            f"{shorten_list(shared)}. Take them out of the training images."
        )
    n_train = len(train.labels)
    digest = hashlib.sha256(f"{name} {train.listing} {test.listing}".encode())
    for values in vars(pairs).values():
        digest.update(np.ascontiguousarray(values, dtype=np.int64).tobytes() + b"|")

    def load(index: int) -> Image.Image:
        return train.load(index) if index < n_train else test.load(index - n_train)

    return Dataset(
        name,
        train.classes,
        np.concatenate([train.labels, np.full(len(test.labels), -1)]),
        np.arange(n_train + len(test.labels)) >= n_train,
        (*(f"train/{image}" for image in train.names), *(f"test/{image}" for image in test.names)),
        load,
        digest.hexdigest(),
        train.files + test.files,
        pairs=Pairs(n_train + pairs.first, n_train + pairs.second, pairs.same, pairs.fold),
    )


def _spelling(name: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFC", name))).casefold()


def draw_pairs(labels: np.ndarray, folds: int, per_fold: int, seed: int) -> Pairs:
    """Draws `per_fold` pairs of one class and as many of two classes for each fold. A class is in one fold only.

    No pair is drawn twice.

    Args:
        labels: (N,) int64, the class of each image that a pair may have.

    Raises UserError if a fold has too few pairs.
    """
    random = np.random.default_rng((seed, 5))
    classes = random.permutation(np.unique(labels))
    drawn: list[tuple[np.ndarray, ...]] = []
    for fold in range(folds):
        members = np.flatnonzero(np.isin(labels, classes[fold::folds]))
        first, second = (members[side] for side in np.triu_indices(len(members), k=1))
        for same in (True, False):
            found = np.flatnonzero((labels[first] == labels[second]) == same)
            if len(found) < per_fold:
                raise UserError(
                    f"A fold has {len(found)} pairs of {'one class' if same else 'two classes'}, but {per_fold} are "
                    "wanted (dataset.pairs_per_fold): take fewer, fewer dataset.pair_folds, or more images of a class."
                )
            found = random.permutation(found)[:per_fold]
            drawn.append((first[found], second[found], np.full(per_fold, same), np.full(per_fold, fold)))
    return Pairs(*map(np.concatenate, zip(*drawn, strict=True)))

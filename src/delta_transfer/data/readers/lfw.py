"""Labeled Faces in the Wild in its publisher's layout: lfw/<person>/<person>_0001.jpg, and pairs.txt, its view 2.

The protocol is "unrestricted with labeled outside data": the pairs of pairs.txt, in ten folds, are the test, and no
person in them is in the training images.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.console import shorten_list
from ...common.errors import UserError
from ...common.options import LONGEST, option
from ..dataset import Dataset, Pairs
from ..files import from_files, read_lines
from ..images import SUFFIXES
from ..options import PairsConfig
from ..pairs import with_pairs
from ..registry import reader

Face = tuple[str, int]  # person and number


@dataclass
class LFWConfig(PairsConfig):
    train_root: str | None = option(
        None,
        "folder <person>/<image> to train on; null means the persons of LFW who are in no pair",
        identity=False,
    )
    min_images: int = option(2, "a person with fewer images is not trained on", at_least=1, at_most=LONGEST)


@reader(
    "lfw",
    title="Labeled Faces in the Wild",
    options=LFWConfig,
    needs=("pairs.txt", "lfw"),
    source="lfw.tgz and pairs.txt of http://vis-www.cs.umass.edu/lfw/ (or from a mirror, when it is not reachable)",
    archives=("lfw.tgz",),
)
def lfw(root: Path, config: LFWConfig) -> Dataset:
    """Tests on the pairs; trains on `train_root`/<person>/<image>, or on the persons of LFW who are in no pair.

    Persons with fewer than `min_images` images are not trained on. Raises UserError for a damaged pairs.txt, missing
    images, and a person of `train_root` who is in a pair: people are compared by the names of their folders.
    """
    pairs, fold = _read_pairs(root / "pairs.txt")
    faces = sorted({face for pair in pairs for face in pair})
    persons = sorted({person for person, _ in faces})
    label = {person: index for index, person in enumerate(persons)}
    test = from_files(
        config.name,
        root / "lfw",
        persons,
        [f"{person}/{person}_{number:04d}.jpg" for person, number in faces],
        [label[person] for person, _ in faces],
        [True] * len(faces),
        listed_in="pairs.txt",
    )
    place = {face: index for index, face in enumerate(faces)}
    first, second = (np.array([place[pair[side]] for pair in pairs], dtype=np.int64) for side in (0, 1))
    same = np.array([a[0] == b[0] for a, b in pairs])
    train = _train(root, config, set(persons))
    return with_pairs(config.name, train, test, Pairs(first, second, same, np.array(fold, dtype=np.int64)))


def _train(root: Path, config: LFWConfig, tested: set[str]) -> Dataset:
    folder = Path(config.train_root).expanduser() if config.train_root else root / "lfw"
    if not folder.is_dir():
        raise UserError(f"dataset.train_root: there is no folder {folder}.")
    images: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.glob("[!.]*/[!.]*")):
        person = path.parent.name
        if path.suffix.lower() in SUFFIXES and not (config.train_root is None and person in tested):
            images[person].append(f"{person}/{path.name}")
    kept = {person: files for person, files in images.items() if len(files) >= config.min_images}
    if len(kept) < 2:
        raise UserError(
            f"{folder} has {len(kept)} persons to train on with dataset.min_images={config.min_images} images or more"
            f"{'' if config.train_root else ' who are in no pair'}: two or more are needed. Another folder of faces is "
            "dataset.train_root=DIR, with a folder for each person."
        )
    labels = [label for label, files in enumerate(kept.values()) for _ in files]
    files = [file for person in kept.values() for file in person]
    return from_files(
        f"{config.name}-train", folder, list(kept), files, labels, [False] * len(files), listed_in=str(folder)
    )


def _read_pairs(path: Path) -> tuple[list[tuple[Face, Face]], list[int]]:
    """Pairs, and the fold of each.

    The first line has the number of folds, and the number of pairs of either kind in a fold. The other lines are, fold
    by fold, `<person> <number> <number>` and `<person> <number> <person> <number>`.
    """
    lines = [line.split() for line in read_lines(path)]
    head = lines.pop(0) if lines else []
    if len(head) != 2 or not all(word.isascii() and word.isdigit() for word in head) or int(head[0]) < 2:
        raise UserError(
            f"{path} must begin with the number of folds, two or more, and of pairs of either kind in one, as in "
            f"'10 300' (view 2); it begins with {' '.join(head)!r}."
        )
    folds, per_fold = map(int, head)
    if len(lines) != 2 * folds * per_fold or not lines:
        raise UserError(
            f"{path} announces {folds} folds of {per_fold} + {per_fold} pairs, {2 * folds * per_fold:,} lines, but "
            f"{len(lines):,} follow."
        )
    pairs, wrong = [], []
    for number, words in enumerate(lines):
        same = number % (2 * per_fold) < per_fold
        numbers = words[1:] if same else words[1::2]
        right = len(words) == (3 if same else 4) and all(n.isascii() and n.isdigit() and len(n) < 9 for n in numbers)
        if right:
            a, b = ((words[0], int(words[1])), (words[0] if same else words[2], int(words[-1])))
            right = a != b and same == (a[0] == b[0])
        if right:
            pairs.append((a, b))
        else:
            wrong.append(f"pair {number + 1} {' '.join(words)!r}")
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} lines are no pair of the expected kind, two images of one person or of two "
            f"({per_fold} of each in turn): {shorten_list(wrong)}."
        )
    return pairs, [number // (2 * per_fold) for number in range(len(pairs))]

"""Tiny-ImageNet-200 in its publisher's layout, whole or with fewer images."""

from pathlib import Path

from ...common.console import shorten_list
from ...common.errors import UserError
from ...config import DatasetConfig
from ..dataset import Dataset
from ..files import from_files, read_lines


def tiny_imagenet(root: Path, config: DatasetConfig) -> Dataset:
    """Reads the training images that are there and those that val/val_annotations.txt lists, the test part.

    (The publisher's own test part has no labels.) The classes are in the order of wnids.txt, each called by its
    WordNet id and the first of its names in words.txt. Raises UserError for a class without a training image and
    for an annotation that is malformed or has a WordNet id that wnids.txt lacks.
    """
    wnids = read_lines(root / "wnids.txt")
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    if len(label_of) < len(wnids):
        raise UserError(f"{root / 'wnids.txt'} names a class twice.")

    files, labels, empty = [], [], []
    for label, wnid in enumerate(wnids):
        found = sorted(path.name for path in (root / "train" / wnid / "images").glob("[!.]*.JPEG"))
        files += [f"train/{wnid}/images/{name}" for name in found]
        labels += [label] * len(found)
        if not found:
            empty.append(wnid)
    if empty:
        raise UserError(f"{len(empty)} classes of wnids.txt have no image in {root / 'train'}: {shorten_list(empty)}.")
    n_train = len(files)

    annotations = root / "val" / "val_annotations.txt"
    for number, line in enumerate(read_lines(annotations), start=1):
        file, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0]  # the object's box follows
        if wnid not in label_of:
            raise UserError(f"{annotations}, entry {number}: expected a file and a class of wnids.txt, found {line!r}.")
        files.append(f"val/images/{file}")
        labels.append(label_of[wnid])

    is_test = [False] * n_train + [True] * (len(files) - n_train)
    return from_files(
        "tiny_imagenet", root, _names(root / "words.txt", wnids), files, labels, is_test, "val_annotations.txt"
    )


def _names(words: Path, wnids: list[str]) -> list[str]:
    """E.g. "n01443537 goldfish" where the list says "n01443537<TAB>goldfish, Carassius auratus"."""
    name_of = dict(line.split("\t", maxsplit=1) for line in read_lines(words) if "\t" in line)
    return [f"{wnid} {name_of.get(wnid, '').split(',')[0]}".strip() for wnid in wnids]

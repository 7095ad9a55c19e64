"""Which folders of a person's images are splits, which are classes, and which level is neither."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..common.console import quoted, shorten_list
from ..common.errors import UserError
from .tree import Listing, loose_images, subfolders

# Names of the folders of splits, in upper or lower case.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first that is there is the test split
# Words in other names of them, such as train_set, seg_test, TestImages; and in a table.
SPLIT_WORDS = {
    "train": {"train", "training", "trn", "trainval"},
    "test": {"test", "testing", "tests", "tst", "eval", "evaluation", "holdout"},
    "val": {"val", "valid", "validation", "dev"},
}
# Folders of data sets for segmentation or detection: pictures, and what was drawn into each.
PICTURES = {"image", "images", "img", "imgs", "photo", "photos", "jpegimages", "input", "inputs"}
DRAWN = {"mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations"} | {
    *(
        "segmentationclass",
        "segmentationobject",
        "groundtruth",
        "ground_truth",
        "gt",
        "bbox",
        "bboxes",
        "target",
        "targets",
    )
}
LAYOUTS = "dataset=folder reads DIR/train/<class>/* with DIR/test/<class>/*, or DIR/<class>/* (dataset.root=DIR)"


def split_named(name: str) -> str | None:
    """The split (train, test or val) that a name such as seg_train or TestImages means; None for other names."""
    words = {re.sub(r"(set|data|images?)$", "", word.lower()) for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    found = [split for split, known in SPLIT_WORDS.items() if words & known]
    return found[0] if len(found) == 1 else None


def class_folders_below(only: str, images: list[str]) -> str:
    """The folder, `only` or one below it, that holds more than one folder of `images`."""
    paths = {tuple(image.split("/")[:-1]) for image in images}
    while len(first := {path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        if split_named(name := first.pop()):
            break
        only, paths = f"{only}/{name}", {path[1:] for path in paths}
    return only


def shown(name: str) -> str:
    """Equal for names that look the same."""
    return unicodedata.normalize("NFC", name).strip()


def spelling(name: str) -> str:
    """Equal for names that look the same except for upper and lower case or leading zeros (1, 01)."""
    return (shown(name).lstrip("0") or "0") if shown(name).isdecimal() else shown(name).casefold()


def names_several(name: str, classes: Sequence[str]) -> bool:
    """Whether a class has the names of several others, such as cat;dog for an image of both."""
    words = re.split(r"\s*[;|,/&+]\s*|\s+", name)
    return len(words) > 1 and set(words) <= set(classes)


def difference(one: str, other: str) -> str:
    if unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other):
        return "their Unicode form"
    if shown(one) == shown(other):
        return "a space"
    return "leading zeros" if shown(one).isdecimal() else "upper and lower case"


def is_split(parent: Path) -> bool:
    """Whether a folder with the name of a split is a split. A class of that name holds images directly."""
    return bool(subfolders(parent)[0]) or not holds_images(parent)


def holds_images(parent: Path) -> bool:
    return next(loose_images(parent), None) is not None


def check_level(tree: Path, listings: dict[str, Listing], is_root: bool, nested: bool) -> None:
    """Raises UserError if the folders in `tree`, whose files are listed, are too few or are not the classes.

    nested: whether the user says that they are the classes, although the same folders repeat below each.
    """
    names = list(listings)
    if not names:
        advice = f"{LAYOUTS}; or write {tree / 'labels.csv'} (columns file, label, perhaps split)"
        raise UserError(f"{tree} holds no class folder. {advice}.")
    direct = [name for name in names if any("/" not in image for image in listings[name].images)]
    holding = [name for name in names if listings[name].images]
    below = {name: sorted({image.split("/")[0] for image in listings[name].images}) for name in holding}
    if len(holding) == 1 and not direct:
        inner = class_folders_below(holding[0], listings[holding[0]].images)
        advice = quoted(f"dataset.root={tree / inner}") if is_root else f"move them into {tree}"
        raise UserError(f"{tree} holds images in one folder only, {holding[0]}. The classes are in {inner}: {advice}")
    if len(names) < 2:
        raise UserError(f"{tree} holds a single class folder, {names[0]}; two or more are needed. {LAYOUTS}.")
    if {name.lower() for name in names} <= PICTURES | DRAWN and not PICTURES.isdisjoint(map(str.lower, names)):
        raise UserError(
            f"{tree}: the folders {shorten_list(names)} seem to hold images and annotations for segmentation or "
            f"detection, and not classes. Classification needs a folder for each class. {LAYOUTS}."
        )
    copies = [name for name in holding if name not in direct and set(below[name]) & (set(names) - {name})]
    if copies and direct:
        raise UserError(
            f"{tree / copies[0]} holds folders with the names of the classes beside it "
            f"({shorten_list([name for name in below[copies[0]] if name in names])}): it is not a class. "
            f"{quoted(f'dataset.ignore=[{copies[0]}]')} leaves it out."
        )
    times = Counter(one for name in holding for one in below[name] if name not in direct)
    repeated = {one for one, count in times.items() if count > 1}
    deep = [name for name in holding if name not in direct]
    if len(deep) > len(direct) and len(repeated) > 1 and all(repeated & set(below[name]) for name in deep):
        if nested:
            return
        if all(map(split_named, repeated)):
            raise UserError(
                f"{tree}: the splits ({shorten_list(sorted(repeated))}) are inside the folders of the classes. Make it "
                f"train/{deep[0]} and so on, or set dataset.nested=true to draw another test split from all images."
            )
        raise UserError(
            f"{tree}: the folders {shorten_list(deep)} do not seem to be the classes: the same folders "
            f"({shorten_list(sorted(repeated))}) repeat below each. Rename the splits to train/ and test/, take one "
            f"folder ({quoted(f'dataset.root={tree / deep[0]}')}), or set dataset.nested=true if they are the classes."
        )

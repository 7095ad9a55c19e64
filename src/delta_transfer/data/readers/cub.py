"""CUB-200-2011 in its publisher's layout, whole or with a subset of the classes."""

from pathlib import Path

from ...common.console import shorten_list
from ...common.errors import UserError
from ...config import DatasetConfig
from ..dataset import Dataset
from ..files import from_files, read_lines


def cub(root: Path, config: DatasetConfig) -> Dataset:
    """Reads the official lists: pairs of a number and a value, 1-based.

    `images.txt` decides which images there are; ids of the other lists that it does not name are ignored (a subset
    of the classes may keep longer lists). Raises UserError for lists that contradict each other.
    """
    files = _read_pairs(root / "images.txt")
    label_of = _read_pairs(root / "image_class_labels.txt")
    train_flag = _read_pairs(root / "train_test_split.txt")
    class_names = _read_pairs(root / "classes.txt")

    for list_name, entries in (("image_class_labels.txt", label_of), ("train_test_split.txt", train_flag)):
        unlisted = [image_id for image_id in files if image_id not in entries]
        if unlisted:
            raise UserError(f"{root / list_name} has no line for the image ids {shorten_list(unlisted)}.")
    wrong = [
        f"image id {image_id} has {train_flag[image_id]}"
        for image_id in files
        if train_flag[image_id] not in ("0", "1")
    ]
    if wrong:
        raise UserError(f"{root / 'train_test_split.txt'} must have 1 (train) or 0 (test), but {shorten_list(wrong)}.")
    used = {label_of[image_id] for image_id in files}
    if used - class_names.keys():
        raise UserError(f"{root / 'classes.txt'} has no class {sorted(used - class_names.keys())[0]}.")
    empty = [name for class_id, name in class_names.items() if class_id not in used]
    if empty:
        raise UserError(f"{root / 'classes.txt'} lists {len(empty)} classes without an image: {shorten_list(empty)}.")

    # Ids of another root's lists may all be there: only the class folders of the paths tell.
    mixed = [
        f"{file} has the class {class_names[label_of[image_id]]}"
        for image_id, file in files.items()
        if file.split("/")[0] != class_names[label_of[image_id]]
    ]
    if mixed:
        raise UserError(
            f"The lists in {root} do not belong together: by image_class_labels.txt and classes.txt, {len(mixed)} of "
            f"{len(files)} images are not of the class whose folder they are in: {shorten_list(mixed)}. Take all "
            "lists from one copy of the data set."
        )

    class_ids = sorted(class_names, key=int)
    order = {class_id: label for label, class_id in enumerate(class_ids)}
    return from_files(
        "cub",
        root / "images",
        [class_names[class_id] for class_id in class_ids],
        list(files.values()),
        [order[label_of[image_id]] for image_id in files],
        [train_flag[image_id] == "0" for image_id in files],
        listed_in="images.txt",
    )


def _read_pairs(path: Path) -> dict[str, str]:
    """`<id> <value>` lines as a dictionary, in file order."""
    pairs = {}
    for number, line in enumerate(read_lines(path), start=1):
        parts = line.split(maxsplit=1)
        if len(parts) != 2 or not parts[0].isdigit():
            raise UserError(f"{path}, entry {number}: expected an id and a value, found {line!r}.")
        pairs[parts[0]] = parts[1].strip()
    return pairs

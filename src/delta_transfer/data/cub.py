"""CUB-200-2011 in its publisher's layout, whole or with a subset of the classes."""

from pathlib import Path

from ..config import DatasetConfig
from ..errors import UserError
from .dataset import Dataset
from .files import few, from_files, read_lines


def cub(root: Path, config: DatasetConfig) -> Dataset:
    """Reads the official lists: pairs of a number and a value, 1-based.

    `images.txt` decides which images there are; ids of the other lists that it does not name are ignored (a subset
    of the classes may keep longer lists).
    """
    files = _read_pairs(root / "images.txt")
    label_of = _read_pairs(root / "image_class_labels.txt")
    train_flag = _read_pairs(root / "train_test_split.txt")
    class_names = _read_pairs(root / "classes.txt")

    for list_name, entries in (("image_class_labels.txt", label_of), ("train_test_split.txt", train_flag)):
        unlisted = [image_id for image_id in files if image_id not in entries]
        if unlisted:
            raise UserError(f"{root / list_name} has no line for the image ids {few(unlisted)}.")
    used = {label_of[image_id] for image_id in files}
    if used - class_names.keys():
        raise UserError(f"{root / 'classes.txt'} has no class {sorted(used - class_names.keys())[0]}.")
    empty = [name for class_id, name in class_names.items() if class_id not in used]
    if empty:
        raise UserError(f"{root / 'classes.txt'} lists {len(empty)} classes without an image: {few(empty)}.")

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

"""CUB-200-2011 in its publisher's layout, whole or with a subset of the classes."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .dataset import Dataset

LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def cub(root: str | None) -> Dataset:
    """Reads the official lists under `root`.

    `images.txt` decides which images there are; ids of the other lists that it does not name are ignored (a subset
    of the classes may keep longer lists). Raises UserError for a missing root, list, label or image file.
    """
    folder = _check_root(root)
    files = _read_pairs(folder / "images.txt")
    label_of = _read_pairs(folder / "image_class_labels.txt")
    train_flag = _read_pairs(folder / "train_test_split.txt")
    class_names = _read_pairs(folder / "classes.txt")

    for list_name, entries in (("image_class_labels.txt", label_of), ("train_test_split.txt", train_flag)):
        unlisted = [image_id for image_id in files if image_id not in entries]
        if unlisted:
            raise UserError(
                f"{folder / list_name} has no line for image id {unlisted[0]} (and {len(unlisted) - 1} more)."
            )
    used = {label_of[image_id] for image_id in files}
    if used - class_names.keys():
        raise UserError(f"{folder / 'classes.txt'} has no class {sorted(used - class_names.keys())[0]}.")
    empty = [name for class_id, name in class_names.items() if class_id not in used]
    if empty:
        raise UserError(
            f"{folder / 'classes.txt'} lists {len(empty)} classes without an image: {', '.join(empty[:5])}."
        )
    missing = [name for name in files.values() if not (folder / "images" / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} images listed in {folder / 'images.txt'} are missing: {', '.join(missing[:5])}."
        )

    ids = list(files)
    order = {class_id: label for label, class_id in enumerate(sorted(class_names, key=int))}
    names = tuple(files[i] for i in ids)
    labels = np.array([order[label_of[i]] for i in ids], dtype=np.int64)
    is_test = np.array([train_flag[i] == "0" for i in ids])

    digest = hashlib.sha256(b"cub")
    for name, label, test in zip(names, labels, is_test, strict=True):
        size = (folder / "images" / name).stat().st_size
        digest.update(f"{name}\0{size}\0{label}\0{int(test)}\n".encode())

    def load(index: int) -> Image.Image:
        with Image.open(folder / "images" / names[index]) as image:
            return image.convert("RGB")  # two of the published images are grey

    classes = tuple(class_names[class_id] for class_id in order)
    return Dataset("cub", classes, labels, is_test, names, load, digest.hexdigest())


def _check_root(root: str | None) -> Path:
    folder = Path(root).expanduser() if root else None
    absent = [name for name in (*LISTS, "images") if folder is None or not (folder / name).exists()]
    if absent:
        found = "dataset.root is not set" if folder is None else f"{folder} lacks {', '.join(absent)}"
        raise UserError(
            f"CUB-200-2011 was not found: {found}. Download CUB_200_2011.tgz (1.1 GB) from "
            "https://data.caltech.edu/records/65de6-vp158, unpack it, and pass its folder: "
            f"dataset.root=/path/to/CUB_200_2011. It must hold {', '.join(LISTS)} and images/<class>/<image>.jpg."
        )
    return folder


def _read_pairs(path: Path) -> dict[str, str]:
    """`<id> <value>` lines as a dictionary, in file order."""
    pairs = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        parts = line.split(maxsplit=1)
        if len(parts) != 2 or not parts[0].isdigit():
            raise UserError(f"{path}, line {number}: expected an id and a value, found {line!r}.")
        pairs[parts[0]] = parts[1].strip()
    return pairs

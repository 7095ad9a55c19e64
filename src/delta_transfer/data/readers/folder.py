"""Any folder of images: with a test split of its own, or one tree of classes that a seeded draw splits."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.console import log, shorten_list
from ...common.errors import UserError
from ...common.options import option
from ..dataset import Dataset
from ..files import from_files
from ..options import DatasetConfig
from ..registry import reader

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# Pictures of telephones and cameras that are not read here. A message says how many of them are left out.
OTHER_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"}
# Names of the folders of splits, in upper or lower case.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # the first that is there is the test split
LAYOUTS = "dataset=folder reads DIR/train/<class>/* with DIR/test/<class>/*, or DIR/<class>/* (dataset.root=DIR)"


@dataclass
class FolderConfig(DatasetConfig):
    test_fraction: float = option(
        0.2,
        "fraction of each class that is tested on, drawn with subset_seed where there is no test folder",
        above=0,
        below=1,
    )


@reader(
    "folder", title="A folder of images", options=FolderConfig, source="images of your own, a folder for each class"
)
def folder(root: Path | None, config: FolderConfig) -> Dataset:
    """Reads train/<class>/** with test/<class>/** (or another name of TEST_NAMES), else splits one tree <class>/**.

    Without a test split, `test_fraction` of each class is drawn, from train/ where there is such a folder. Files are
    images by their suffix, at any depth of a class folder; hidden files and __MACOSX are left out. Raises UserError
    for a folder that has neither layout or mixes them, for two folders of one split, for fewer than two classes, and
    for a class without an image, with too few to split, or without a training image.
    """
    if root is None:
        raise UserError(f"dataset.root is not set. {LAYOUTS}.")
    if not root.is_dir():
        raise UserError(f"There is no folder {root}. {LAYOUTS}.")

    folders = _folders(root)
    train, tests = (_splits(root, folders, names) for names in (TRAIN_NAMES, TEST_NAMES))
    splits = train + tests
    classes = [name for name in folders if name not in splits and _holds_images(root / name)]
    if splits and classes:
        raise UserError(
            f"{root} mixes two layouts: folders that hold images ({shorten_list(classes)}) are beside folders that "
            f"hold class folders ({', '.join(splits)}). {LAYOUTS}."
        )
    same = train if len(train) > 1 else [name for name in tests if name.lower() == tests[0].lower()]
    if len(same) > 1:
        raise UserError(
            f"{root} has {len(same)} folders for the {'train' if same is train else 'test'} split: {', '.join(same)}. "
            "Keep one of them, or give the others a name that begins with a dot."
        )
    if train:
        left_out = [name for name in folders if name not in (*train, *tests[:1])]
        return _two_splits(root, train[0], tests[0] if tests else None, left_out, config)
    # Folders that have names of splits and hold images directly are not classes.
    if splits or (folders and {name.lower() for name in folders} <= {*TRAIN_NAMES, *TEST_NAMES}):
        raise UserError(f"{root} has no train/<class>/; it holds the folders {shorten_list(folders)}. {LAYOUTS}.")
    return _drawn(_class_images(root, root), root, config)


def _two_splits(
    root: Path, train_name: str, test_name: str | None, left_out: list[str], config: FolderConfig
) -> Dataset:
    if left_out or (test_name and not test_name.lower().startswith("test")):
        chosen = f"is {test_name}/" if test_name else f"is drawn from {train_name}/"
        others = f"; left out: {', '.join(f'{name}/' for name in left_out)}" if left_out else ""
        log.info(f"{root}: the test split {chosen}{others}")
    train = _class_images(root, root / train_name)
    if test_name is None:
        return _drawn(train, root, config)
    test = _class_images(root, root / test_name)
    unknown = sorted(test.keys() - train.keys())
    if unknown:
        raise UserError(f"{root / test_name} has classes that {root / train_name} lacks: {shorten_list(unknown)}.")
    return _dataset(config.name, root, train, test)


def _drawn(images: dict[str, list[str]], root: Path, config: FolderConfig) -> Dataset:
    train, test = {}, {}
    for label, (name, files) in enumerate(images.items()):
        if len(files) < 2:
            raise UserError(
                f"Class {name} of {root} has one image: too few for a training and a test split. Add some, or put the "
                "test images into a folder of their own (test/<class>/)."
            )
        n_test = min(max(1, round(config.test_fraction * len(files))), len(files) - 1)
        drawn = np.random.default_rng((config.subset_seed, 4, label)).permutation(files).tolist()
        train[name], test[name] = sorted(drawn[n_test:]), sorted(drawn[:n_test])
    return _dataset(config.name, root, train, test)


def _dataset(data_set: str, root: Path, train: dict[str, list[str]], test: dict[str, list[str]]) -> Dataset:
    classes, files, labels, is_test = list(train), [], [], []
    for split in (train, test):
        for name, images in split.items():
            files += images
            labels += [classes.index(name)] * len(images)
            is_test += [split is test] * len(images)
    return from_files(data_set, root, classes, files, labels, is_test, listed_in=str(root))


def _class_images(root: Path, tree: Path) -> dict[str, list[str]]:
    """The image files of each class folder of `tree`, as paths below `root`, both sorted."""
    names = _folders(tree)
    if not names:
        raise UserError(f"{tree} holds no class folder. {LAYOUTS}.")
    if len(names) < 2:
        raise UserError(f"{tree} holds a single class folder, {names[0]}; two or more are needed. {LAYOUTS}.")
    images = {name: [path.relative_to(root).as_posix() for path in images_below(tree / name)] for name in names}
    if others := [path for name in names for path in other_pictures_below(tree / name)]:
        kinds = ", ".join(sorted({path.suffix.lower() for path in others}))
        log.info(f"{tree}: pictures of formats not read here are left out: {len(others)} ({kinds}); convert to .jpg")
    if loose := sum(_is_image(path) and _visible(path.name) for path in tree.iterdir()):
        log.info(f"{tree}: images in no class folder are left out: {loose}")
    empty = [name for name in names if not images[name]]
    if empty:
        raise UserError(
            f"Class folders of {tree} without an image ({', '.join(sorted(SUFFIXES))}): {shorten_list(empty)}."
        )
    return images


def images_below(folder: Path) -> list[Path]:
    """The image files, by their suffix, at any depth of `folder`, sorted; without hidden files and __MACOSX."""
    return sorted(filter(_is_image, _visible_below(folder)), key=Path.as_posix)


def other_pictures_below(folder: Path) -> list[Path]:
    """The pictures below `folder` in formats that are not read here."""
    return sorted(path for path in _visible_below(folder) if path.suffix.lower() in OTHER_SUFFIXES)


def _visible_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if all(map(_visible, path.relative_to(folder).parts)))


def _folders(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir() and _visible(path.name))


def _splits(root: Path, folders: list[str], names: tuple[str, ...]) -> list[str]:
    """The `folders` of splits that have one of `names`, in the order of `names`."""
    found = [folder for folder in folders if folder.lower() in names and _is_split(root / folder)]
    return sorted(found, key=lambda folder: names.index(folder.lower()))


def _is_split(parent: Path) -> bool:
    """Whether a folder with the name of a split is one. A class may have that name, too: it holds images directly."""
    return bool(_folders(parent)) or not _holds_images(parent)


def _holds_images(parent: Path) -> bool:
    return any(_is_image(path) and _visible(path.name) for path in parent.iterdir())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"

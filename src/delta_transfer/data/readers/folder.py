"""Any folder of images: with a test part of its own, or one tree of classes that a seeded draw splits."""

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
# Of pictures that are not read here: telephones and cameras make them, and nobody should miss them unawares.
OTHER_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf"}
# Names of parts, in whatever case.
TRAIN_PARTS = ("train", "training")
TEST_PARTS = ("test", "testing", "val", "valid", "validation")  # the first of them that is there is the test part
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
    """Reads train/<class>/** with test/<class>/** (or another name of TEST_PARTS), else splits one tree <class>/**.

    Without a test part, `test_fraction` of each class is drawn, from train/ where there is such a folder. Files are
    images by their suffix, at any depth of a class folder; what is hidden and __MACOSX is left out. Raises UserError
    for a folder that has neither layout or mixes them, or two folders for one part, for fewer than two classes, and
    for a class without an image, with too few to split, or without a training image.
    """
    if root is None:
        raise UserError(f"dataset.root is not set. {LAYOUTS}.")
    if not root.is_dir():
        raise UserError(f"There is no folder {root}. {LAYOUTS}.")

    folders = _folders(root)
    train, tests = (_parts(root, folders, names) for names in (TRAIN_PARTS, TEST_PARTS))
    parts = train + tests
    classes = [name for name in folders if name not in parts and _holds_images(root / name)]
    if parts and classes:
        raise UserError(
            f"{root} mixes two layouts: folders that hold images ({shorten_list(classes)}) are beside folders that "
            f"hold class folders ({', '.join(parts)}). {LAYOUTS}."
        )
    same = train if len(train) > 1 else [name for name in tests if name.lower() == tests[0].lower()]
    if len(same) > 1:
        raise UserError(
            f"{root} has {len(same)} folders for the {'train' if same is train else 'test'} part: {', '.join(same)}. "
            "Keep one of them, or give the others a name that begins with a dot."
        )
    if train:
        left_out = [name for name in folders if name not in (*train, *tests[:1])]
        return _two_parts(root, train[0], tests[0] if tests else None, left_out, config)
    # As classes, folders that are called like parts and hold images would be nonsense.
    if parts or (folders and {name.lower() for name in folders} <= {*TRAIN_PARTS, *TEST_PARTS}):
        raise UserError(f"{root} has no train/<class>/; it holds the folders {shorten_list(folders)}. {LAYOUTS}.")
    return _split(_class_images(root, root), root, config)


def _two_parts(
    root: Path, train_part: str, test_part: str | None, left_out: list[str], config: FolderConfig
) -> Dataset:
    if left_out or (test_part and not test_part.lower().startswith("test")):
        chosen = f"is {test_part}/" if test_part else f"is drawn from {train_part}/"
        others = f"; left out: {', '.join(f'{name}/' for name in left_out)}" if left_out else ""
        log.info(f"{root}: the test part {chosen}{others}")
    train = _class_images(root, root / train_part)
    if test_part is None:
        return _split(train, root, config)
    test = _class_images(root, root / test_part)
    unknown = sorted(test.keys() - train.keys())
    if unknown:
        raise UserError(f"{root / test_part} has classes that {root / train_part} lacks: {shorten_list(unknown)}.")
    return _dataset(root, train, test)


def _split(images: dict[str, list[str]], root: Path, config: FolderConfig) -> Dataset:
    train, test = {}, {}
    for label, (name, files) in enumerate(images.items()):
        if len(files) < 2:
            raise UserError(
                f"Class {name} of {root} has one image: too few for a training and a test part. Add some, or put the "
                "test images into a folder of their own (test/<class>/)."
            )
        n_test = min(max(1, round(config.test_fraction * len(files))), len(files) - 1)
        drawn = np.random.default_rng((config.subset_seed, 4, label)).permutation(files).tolist()
        train[name], test[name] = sorted(drawn[n_test:]), sorted(drawn[:n_test])
    return _dataset(root, train, test)


def _dataset(root: Path, train: dict[str, list[str]], test: dict[str, list[str]]) -> Dataset:
    classes, files, labels, is_test = list(train), [], [], []
    for part in (train, test):
        for name, part_files in part.items():
            files += part_files
            labels += [classes.index(name)] * len(part_files)
            is_test += [part is test] * len(part_files)
    return from_files("folder", root, classes, files, labels, is_test, listed_in=str(root))


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
    """The image files, by their suffix, at any depth of `folder`, sorted; what is hidden and __MACOSX is left out."""
    return sorted(filter(_is_image, _visible_below(folder)), key=Path.as_posix)


def other_pictures_below(folder: Path) -> list[Path]:
    """As `images_below`, the files of formats that are not read here."""
    return sorted(path for path in _visible_below(folder) if path.suffix.lower() in OTHER_SUFFIXES)


def _visible_below(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if all(map(_visible, path.relative_to(folder).parts)))


def _folders(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.is_dir() and _visible(path.name))


def _parts(root: Path, folders: list[str], names: tuple[str, ...]) -> list[str]:
    """Those of `folders` that are parts called like one of `names`, in the order of `names`."""
    found = [folder for folder in folders if folder.lower() in names and _is_part(root / folder)]
    return sorted(found, key=lambda folder: names.index(folder.lower()))


def _is_part(parent: Path) -> bool:
    """Whether a folder called like a part is one. A class may be called so too: its images lie in it directly."""
    return bool(_folders(parent)) or not _holds_images(parent)


def _holds_images(parent: Path) -> bool:
    return any(_is_image(path) and _visible(path.name) for path in parent.iterdir())


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"

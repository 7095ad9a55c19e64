"""Any folder of images: class folders or a table, with a test split of its own or a drawn one."""

import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...common.console import quoted, shorten_list
from ...common.errors import UserError
from ...common.options import MISSING, option
from ..dataset import Dataset
from ..files import from_files
from ..label_table import find_table, read_table
from ..layout import (
    LAYOUTS,
    TEST_NAMES,
    TRAIN_NAMES,
    check_level,
    difference,
    holds_images,
    is_split,
    names_several,
    shown,
    spelling,
    split_named,
)
from ..options import DatasetConfig
from ..registry import reader
from ..tree import IGNORED, list_images, loose_images, matches, subfolders
from ..tree import remarks as sentences

NAME = "folder"  # stands for the name of the folder, and for any name in identities

Images = dict[str, list[str]]  # of each class: paths below the root


@dataclass
class FolderConfig(DatasetConfig):
    test_fraction: float = option(
        0.2,
        "fraction of each class that becomes the test split, drawn with subset_seed if there is no test folder",
        above=0,
        below=1,
    )
    labels: str | None = option(
        None,
        "table with the columns file, label and perhaps split, instead of class folders; none: class folders, even "
        "with a labels.csv in dataset.root",
        identity=False,
    )
    ignore: list[str] = option(
        [], "patterns of names or paths below dataset.root that are left out, such as [*_mask.png,old]", identity=False
    )
    allow_empty: bool = option(False, "leave out class folders without an image instead of refusing", identity=False)
    nested: bool = option(
        False,
        "take the folders in dataset.root as classes, even if the same folders repeat below each",
        identity=False,
    )

    def check(self) -> None:
        if self.name in (NAME, MISSING) and (place := self.root or self.labels):
            self.name = name_of_folder(Path(place).expanduser().absolute())
        super().check()

    @property
    def identity_name(self) -> str:
        """Runs on the same images are the same, whatever the data set is called."""
        return NAME


def name_of_folder(folder: Path) -> str:
    """A name for runs and reports, such as my_photos for /data/my photos."""
    words = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", folder.name.removesuffix(".csv"))).strip("_.-")
    return words.encode()[:60].decode(errors="ignore") or NAME


@reader(
    "folder", title="A folder of images", options=FolderConfig, source="images of your own, a folder for each class"
)
def folder(root: Path | None, config: FolderConfig) -> Dataset:
    """Reads train/<class>/** with test/<class>/** (or another name of it), else splits one tree <class>/**.

    A table of labels in `root`, or the one of `config.labels`, comes first. Without a test split, `test_fraction` of
    each class is drawn, from train/ where there is such a folder. `tree.list_images` says which files are images, at
    any depth of a class folder. The remarks of the data set say what is left out and what may surprise.

    Raises UserError for a folder that has neither layout or mixes them, for folders that are not the classes, for two
    folders of one split, for fewer than two classes, and for a class without an image, without a training image, or
    with too few images to split.
    """
    if root is None and config.labels in (None, "none"):
        raise UserError(f"dataset.root is not set. {LAYOUTS}.")
    if root is not None and root.is_file():
        hint = f" A table of labels is {quoted(f'dataset.labels={root}')}." if root.suffix == ".csv" else ""
        raise UserError(f"{root} is a file, and dataset.root is a folder.{hint} {LAYOUTS}.")
    if root is not None and not root.is_dir():
        raise UserError(f"There is no folder {root}. {LAYOUTS}.")
    table, why_not = find_table(config.labels, root)
    if table is not None:
        return _Folder(root or table.parent, config).from_table(table)
    assert root is not None
    found = _Folder(root, config)
    if why_not:
        found.remarks.append(f"{root}: {why_not}")
    try:
        return found.from_folders()
    except UserError as error:
        folders = {name: why for name, why in found.left_out.items() if name.endswith("/")}
        hints = [*([why_not] if why_not else []), *sentences(root, folders)]
        raise UserError(" ".join([str(error), *(f"({hint}.)" for hint in hints)])) from None


class _Folder:
    """Reads one folder, and collects `remarks`."""

    def __init__(self, root: Path, config: FolderConfig):
        self.root, self.config = root, config
        self.remarks: list[str] = []
        self.left_out: dict[str, str] = {}

    # --- A table ---

    def from_table(self, path: Path) -> Dataset:
        table = read_table(path, self.root, split_named, self.config.ignore)
        listing = list_images(self.root, self.config.ignore)
        unnamed = dict.fromkeys(sorted(set(listing.images) - table.files), f"not in {path.name}")
        others = {name: why for name, why in listing.left_out.items() if self.root / name != path}
        self.left_out |= table.left_out | others | unnamed
        not_read = f"; its columns that are not read: {shorten_list(table.not_read)}" if table.not_read else ""
        self.remarks.append(f"{self.root}: the labels are those of {path.name}{not_read}")
        if len(table.classes) < 2:
            found = f"a single label, {table.classes[0]}" if table.classes else "no label"
            raise UserError(f"{path} has {found}; two or more are needed.")
        self._say_alike(path, table.classes)
        if several := [one for one in table.classes if names_several(one, table.classes)]:
            self.remarks.append(f"{path}: an image has one label, so that these are classes: {shorten_list(several)}")
        listed = "\0".join(("", *table.classes))  # a folder's class is in the paths of its images
        if not table.splits:
            return self._drawn(table.images(None), path.name, listed)
        if "train" not in table.splits:
            raise UserError(f"{path} has no line whose split is train; it has {', '.join(sorted(table.splits))}.")
        test = next((name for name in ("test", "val") if name in table.splits), None)
        unused = sorted(table.splits - {"train", test})
        if unused or test != "test":
            self._say_test_split(test or "drawn from train", unused)
        for name in unused:
            self.left_out |= dict.fromkeys(sum(table.images(name).values(), []), f"the split {name}")
        if test is None:
            return self._drawn(table.images("train"), path.name, listed)
        return self._given(table.images("train"), table.images(test), path.name, listed)

    # --- Class folders ---

    def from_folders(self) -> Dataset:
        root = self.root
        folders, left_out = subfolders(root, self.config.ignore)
        self.left_out |= left_out
        train, tests = self._splits(folders)
        splits = train + tests
        classes = [name for name in folders if name not in splits and holds_images(root / name)]
        if splits and classes:
            raise UserError(
                f"{root} mixes two layouts: folders that hold images ({shorten_list(classes)}) are beside folders that "
                f"hold class folders ({', '.join(splits)}). {LAYOUTS}."
            )
        same = train if len(train) > 1 else [name for name in tests if name.lower() == tests[0].lower()]
        if len(same) > 1:
            raise UserError(
                f"{root} has {len(same)} folders for the {'train' if same is train else 'test'} split: "
                f"{', '.join(same)}. Keep one of them, or leave the others out by dataset.ignore=[NAME]."
            )
        if train:
            return self._two_splits(train[0], tests[0] if tests else None, folders)
        # Folders that have names of splits and hold images directly are not classes.
        if splits or (folders and {name.lower() for name in folders} <= {*TRAIN_NAMES, *TEST_NAMES}):
            raise UserError(f"{root} has no train/<class>/; it holds the folders {shorten_list(folders)}. {LAYOUTS}.")
        return self._drawn(self._class_images(""), str(root))

    def _splits(self, folders: list[str]) -> tuple[list[str], list[str]]:
        """The folders of the training and of the test split, the first choice first."""

        def called(names: tuple[str, ...]) -> list[str]:
            found = [name for name in folders if name.lower() in names and is_split(self.root / name)]
            return sorted(found, key=lambda name: names.index(name.lower()))

        train, tests = called(TRAIN_NAMES), called(TEST_NAMES)
        others = {name: split_named(name) for name in folders if name not in train + tests}
        others = {
            name: split
            for name, split in others.items()
            if split and self._class_names(name) and not holds_images(self.root / name)
        }
        like_train = train or [name for name, split in others.items() if split == "train"]
        known = {spelling(name) for part in like_train for name in self._class_names(part)}
        alike = [name for name in (*tests, *others) if known & set(map(spelling, self._class_names(name)))]
        if not train and set(alike) <= set(like_train) and len(folders) > 1:  # steam_train beside bus
            return train, tests
        return like_train, tests + [name for split in ("test", "val") for name in alike if others.get(name) == split]

    def _class_names(self, split: str) -> list[str]:
        return subfolders(self.root / self._class_level(split), self.config.ignore, split)[0]

    def _class_level(self, split: str) -> str:
        """The folder of a split that holds its class folders, such as seg_train/seg_train in some archives."""
        names, _ = subfolders(self.root / split, self.config.ignore, split)
        if len(names) == 1 and not holds_images(self.root / split / names[0]):
            inner = f"{split}/{names[0]}"
            if len(subfolders(self.root / inner, self.config.ignore, inner)[0]) > 1:
                return inner
        return split

    def _two_splits(self, train_name: str, test_name: str | None, folders: list[str]) -> Dataset:
        others = [name for name in folders if name not in (train_name, test_name)]
        if odd := train_name.lower() not in TRAIN_NAMES:
            self.remarks.append(f"{self.root}: the training split is {train_name}/")
        if odd or others or (test_name and not test_name.lower().startswith("test")):
            self._say_test_split(
                f"{test_name}/" if test_name else f"drawn from {train_name}/", [f"{n}/" for n in others]
            )
        train = self._class_images(train_name)
        if test_name is None:
            return self._drawn(train, str(self.root))
        test = self._class_images(test_name)
        for name in sorted(test.keys() - train.keys()):
            twins = [other for other in train.keys() - test.keys() if spelling(other) == spelling(name)]
            if len(twins) == 1:
                test[twins[0]] = test.pop(name)
                self.remarks.append(
                    f"{self.root}: {test_name}/{name} is taken as the class {train_name}/{twins[0]}: the names differ "
                    f"only in {difference(name, twins[0])} ({ascii(name)}, {ascii(twins[0])})"
                )
        return self._given(train, test, str(self.root))

    def _class_images(self, split: str) -> Images:
        """The sorted image files of each class folder below `split` ("": the root), as paths below the root."""
        level = self._class_level(split) if split else ""
        tree, config = self.root / level, self.config
        if level != split:
            self.remarks.append(f"{self.root}: the class folders of {split}/ are in {level}/")
        names, left_out = subfolders(tree, config.ignore, level)
        prefix = f"{level}/" if level else ""
        self.left_out |= {f"{prefix}{name}": why for name, why in left_out.items()}
        listings = {name: list_images(tree / name, config.ignore, f"{prefix}{name}") for name in names}
        check_level(tree, listings, tree == self.root, config.nested)
        for name, listing in listings.items():
            self.left_out |= {f"{prefix}{name}/{path}": why for path, why in listing.left_out.items()}
        if nested := [f"{prefix}{name}/{path}" for name in names for path in listings[name].nested]:
            self.remarks.append(
                f"{self.root}: folders inside class folders are read: {len(nested):,} ({shorten_list(nested)})"
            )
        if loose := sum(1 for _ in loose_images(tree)):
            self.remarks.append(f"{tree}: images in no class folder are left out: {loose:,}")
        if empty := [name for name in names if not listings[name].images]:
            if not config.allow_empty:
                simple = len(empty) <= 3 and all(re.fullmatch(r"[\w .-]+", name) for name in empty)
                ignored = quoted(f"dataset.ignore=[{','.join(empty)}]") + " or " if simple else ""
                raise UserError(
                    f"Class folders of {tree} without an image: {shorten_list(empty)}. "
                    f"{ignored}dataset.allow_empty=true leaves them out."
                )
            self.left_out |= {f"{prefix}{name}/": "a class folder without an image" for name in empty}
        self._say_alike(tree, names)
        return {
            name: [f"{prefix}{name}/{path}" for path in listings[name].images] for name in names if name not in empty
        }

    # --- What both have ---

    def _say_test_split(self, chosen: str, others: list[str]) -> None:
        left_out = f"; left out: {', '.join(others)}" if others else ""
        self.remarks.append(f"{self.root}: the test split is {chosen}{left_out}")

    def _say_what_does_nothing(self) -> None:
        ignored = [name.rstrip("/") for name, why in self.left_out.items() if why == IGNORED]
        if idle := [one for one in self.config.ignore if not any(matches(name, [one]) for name in ignored)]:
            self.remarks.append(f"{self.root}: dataset.ignore leaves out nothing by {shorten_list(idle)}")

    def _say_alike(self, place: Path, names: list[str]) -> None:
        """Raises UserError for classes that look the same. Names that differ in case may be intended (letters)."""
        for key, refused in ((shown, True), (spelling, False)):
            groups: dict[str, list[str]] = {}
            for name in names:
                groups.setdefault(key(name), []).append(name)
            for alike in groups.values():
                if len(alike) > 1:
                    words = f"{', '.join(map(ascii, alike))} differ in {difference(*alike[:2])} only"
                    if refused:
                        raise UserError(f"{place}: the classes {words}. Make one folder of them.")
                    self.remarks.append(f"{place}: the classes {words}: are they two classes?")

    def _drawn(self, images: Images, listed_in: str, listed: str = "") -> Dataset:
        train, test = {}, {}
        for label, (name, files) in enumerate(images.items()):
            if len(files) < 2:
                raise UserError(
                    f"Class {name} of {self.root} has {'one image' if files else 'no image'}: too few for a training "
                    "and a test split. Add some, or put the test images into a folder of their own (test/<class>/)."
                )
            n_test = min(max(1, round(self.config.test_fraction * len(files))), len(files) - 1)
            drawn = np.random.default_rng((self.config.subset_seed, 4, label)).permutation(files).tolist()
            train[name], test[name] = sorted(drawn[n_test:]), sorted(drawn[:n_test])
        return self._dataset(train, test, listed_in, listed)

    def _given(self, train: Images, test: Images, listed_in: str, listed: str = "") -> Dataset:
        """The data set with a given test split."""
        if self.config.test_fraction != FolderConfig.test_fraction:
            self.remarks.append(
                f"{self.root}: dataset.test_fraction={self.config.test_fraction:g} does nothing beside a test split"
            )
        return self._dataset(train, test, listed_in, listed)

    def _dataset(self, train: Images, test: Images, listed_in: str, listed: str = "") -> Dataset:
        """Raises UserError for classes without a training image. Names those without a test image."""
        if unknown := sorted(name for name, images in test.items() if images and not train.get(name)):
            raise UserError(
                f"{self.root} has test images of classes without a training image: {shorten_list(unknown)}."
            )
        if untested := [name for name in train if not test.get(name)]:
            self.remarks.append(f"{self.root}: classes without a test image: {shorten_list(untested)}")
        self._say_what_does_nothing()
        test = {name: test[name] for name in train if name in test}
        classes, files, labels, is_test = list(train), [], [], []
        for split in (train, test):
            for name, images in split.items():
                files += images
                labels += [classes.index(name)] * len(images)
                is_test += [split is test] * len(images)
        made = from_files(
            self.config.name, self.root, classes, files, labels, is_test, listed_in=listed_in, digest_of=NAME + listed
        )
        return replace(made, remarks=(*self.remarks, *sentences(self.root, self.left_out)), left_out=self.left_out)

"""MIT Indoor Scenes (67 kinds of rooms) in its publisher's layout."""

from pathlib import Path

from ...common.console import shorten_list
from ...common.errors import UserError
from ...config import DatasetConfig
from ..dataset import Dataset
from ..files import from_files, read_lines


def mit67(root: Path, config: DatasetConfig) -> Dataset:
    """Reads TrainImages.txt and TestImages.txt, lines `<class>/<file>` below Images/.

    The classes are the folders that the training list names, sorted. Raises UserError for a line without a class
    and for a class that only the test list names.
    """
    train, test = _read_list(root / "TrainImages.txt"), _read_list(root / "TestImages.txt")
    files = train + test
    class_of = [file.split("/")[0] for file in files]
    classes = sorted(set(class_of[: len(train)]))
    unknown = sorted(set(class_of) - set(classes))
    if unknown:
        raise UserError(f"{root / 'TestImages.txt'} names classes that TrainImages.txt lacks: {shorten_list(unknown)}.")
    label_of = {name: label for label, name in enumerate(classes)}
    return from_files(
        "mit67",
        root / "Images",
        classes,
        files,
        [label_of[name] for name in class_of],
        [False] * len(train) + [True] * len(test),
        listed_in="TrainImages.txt and TestImages.txt",
    )


def _read_list(path: Path) -> list[str]:
    files = [line.replace("\\", "/") for line in read_lines(path)]
    for file in files:
        if "/" not in file:
            raise UserError(f"{path}: expected lines <class>/<file>, found {file!r}.")
    return files

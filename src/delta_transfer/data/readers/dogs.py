"""Stanford Dogs in its publisher's layout."""

from pathlib import Path

import numpy as np

from ...common.console import shorten_list
from ...common.errors import UserError
from ..dataset import Dataset
from ..files import from_files
from ..options import DatasetConfig
from ..registry import reader


@reader(
    "dogs",
    title="Stanford Dogs",
    needs=("train_list.mat", "test_list.mat", "Images"),
    source="images.tar and lists.tar from http://vision.stanford.edu/aditya86/ImageNetDogs/",
    archives=("images.tar", "lists.tar"),
)
def dogs(root: Path, config: DatasetConfig) -> Dataset:
    """Reads train_list.mat and test_list.mat: `file_list`, paths below Images/, and `labels`, 1-based.

    A class has the name of its folder. Raises UserError for a list that cannot be read, for two folders with one label,
    and for a folder with two labels.
    """
    train, train_labels = _read_list(root / "train_list.mat")
    test, test_labels = _read_list(root / "test_list.mat")
    files, labels = train + test, train_labels + test_labels

    folder_of: dict[int, str] = {}
    label_of: dict[str, int] = {}
    for file, label in zip(files, labels, strict=True):
        folder = file.split("/")[0]
        if folder_of.setdefault(label, folder) != folder:
            raise UserError(f"The lists of {root} give label {label} to {folder_of[label]} and to {folder}.")
        if label_of.setdefault(folder, label) != label:
            raise UserError(f"The lists of {root} give {folder} the labels {label_of[folder]} and {label}.")
    untrained = sorted(set(test_labels) - set(train_labels))
    if untrained:
        names = [folder_of[label] for label in untrained]
        raise UserError(f"{root / 'test_list.mat'} names classes that train_list.mat lacks: {shorten_list(names)}.")
    return from_files(
        config.name,
        root / "Images",
        [folder_of[label] for label in sorted(folder_of)],
        files,
        [label - 1 for label in labels],  # from_files checks the range
        [False] * len(train) + [True] * len(test),
        listed_in="train_list.mat and test_list.mat",
    )


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    from scipy.io import loadmat  # slow to import

    try:
        content = loadmat(path, variable_names=["file_list", "labels"])
        files = [str(cell.item()) for cell in content["file_list"].ravel()]
        labels = content["labels"].ravel()
        if len(files) != len(labels) or (labels != labels.astype(np.int64)).any():
            raise ValueError(f"{len(files)} files, {len(labels)} labels, which must be whole numbers")
    except Exception as error:  # a damaged file can raise nearly anything in loadmat and in what follows
        raise UserError(
            f"{path} cannot be read as a MATLAB list of files and labels ({type(error).__name__}: {error}). "
            "Unpack the publisher's lists.tar again."
        ) from error
    return files, labels.astype(int).tolist()

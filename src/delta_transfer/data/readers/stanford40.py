"""Stanford-40 human actions in its publisher's layout."""

from pathlib import Path

from ...common.console import shorten_list
from ...common.errors import UserError
from ...config import DatasetConfig
from ..dataset import Dataset
from ..files import from_files, read_lines

ENDS = ("_train.txt", "_test.txt")  # of the two lists of an action


def stanford40(root: Path, config: DatasetConfig) -> Dataset:
    """Reads ImageSplits/<action>_train.txt and <action>_test.txt, names of files in JPEGImages/.

    The classes are the actions, sorted. The other lists (actions.txt, train.txt, test.txt) say the same again and
    are not read. Raises UserError where one of an action's two lists is missing.
    """
    splits = root / "ImageSplits"
    # "[!.]": the archive may have been packed on a Mac, which adds files ._<name>.
    train, test = ({path.name.removesuffix(end) for path in splits.glob(f"[!.]*{end}")} for end in ENDS)
    if not train | test:
        raise UserError(f"{splits} holds no list <action>{ENDS[0]}.")
    absent = [action + ENDS[0] for action in test - train] + [action + ENDS[1] for action in train - test]
    if absent:
        raise UserError(f"{splits} lacks {shorten_list(sorted(absent))}: each action needs a list of both parts.")

    classes, files, labels, is_test = sorted(train), [], [], []
    for label, action in enumerate(classes):
        for end in ENDS:
            listed = read_lines(splits / f"{action}{end}")
            files += listed
            labels += [label] * len(listed)
            is_test += [end == ENDS[1]] * len(listed)
    return from_files("stanford40", root / "JPEGImages", classes, files, labels, is_test, listed_in="ImageSplits")

"""An embedded verification task: do two images show the same letter, of a script that was not trained on?"""

from dataclasses import replace

import numpy as np

from ...common.errors import UserError
from ...config import GlyphPairsConfig
from ..dataset import Dataset
from ..pairs import draw_pairs, with_pairs
from .glyphs import SCRIPTS, glyphs, letter_shapes


def glyph_pairs(root: None, config: GlyphPairsConfig) -> Dataset:
    """Trains on the letters of `scripts`; pairs are of letters of `test_scripts` that look like none of those."""
    size, seed = config.render_size, config.render_seed
    train = glyphs(config.scripts, config.train_per_class, 1, size, seed)
    test = glyphs(config.test_scripts, 1, config.test_per_class, size, seed)
    # A letter of both, or one that looks like a letter of the other, is trained on already.
    known = "".join(SCRIPTS[script] for script in config.scripts)
    both = letter_shapes("".join(dict.fromkeys(known + "".join(test.classes))))
    trained = {letter for shape in both if set(shape) & set(known) for letter in shape}
    new = [label for label, shape in enumerate(test.classes) if not trained & set(shape)]
    if len(new) < 2 * config.pair_folds:
        raise UserError(
            f"dataset.test_scripts has {len(new)} letters that look like none of dataset.scripts: every one of "
            f"{config.pair_folds} folds (dataset.pair_folds) needs two or more."
        )
    train = chosen(train, ~train.is_test)
    test = chosen(test, test.is_test & np.isin(test.labels, new))
    pairs = draw_pairs(test.labels, config.pair_folds, config.pairs_per_fold, seed)
    test = replace(test, classes=tuple(test.classes[label] for label in new))
    return with_pairs("glyph_pairs", train, test, pairs)


def chosen(dataset: Dataset, which: np.ndarray) -> Dataset:
    """The images that `which`, (N,) bool, names; its listing stays that of all, and so do the labels."""
    kept = np.flatnonzero(which)
    return replace(
        dataset,
        labels=dataset.labels[kept],
        is_test=dataset.is_test[kept],
        names=tuple(dataset.names[index] for index in kept),
        load=lambda index: dataset.load(kept[index]),
    )

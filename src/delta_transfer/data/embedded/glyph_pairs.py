"""An embedded verification task: do two images show the same letter, of a script that was not trained on?"""

from dataclasses import dataclass, replace

import numpy as np

from ...common.errors import UserError
from ...common.options import LARGEST_BATCH, LONGEST, MISSING, option
from ..dataset import Dataset
from ..options import PairsConfig
from ..pairs import draw_pairs, with_pairs
from ..registry import reader
from .glyphs import SCRIPTS, GlyphsConfig, glyphs, letter_shapes


@dataclass
class GlyphPairsConfig(GlyphsConfig, PairsConfig):
    scripts: list[str] = option(MISSING, "alphabets to train on")
    test_scripts: list[str] = option(MISSING, "alphabets of the pairs, without letters that look like one of scripts")
    test_per_class: int = option(
        MISSING, "images of each letter that pairs are made of", at_least=1, at_most=LARGEST_BATCH
    )
    pair_folds: int = option(10, "number of folds that the letters are divided into", at_least=2, at_most=LONGEST)
    pairs_per_fold: int = option(
        MISSING,
        "pairs of one letter in each fold; there are as many pairs of two letters",
        at_least=1,
        at_most=LARGEST_BATCH,
    )


@reader("glyph_pairs", title="the same letters in pairs: one letter or two?", options=GlyphPairsConfig)
def glyph_pairs(root: None, config: GlyphPairsConfig) -> Dataset:
    """Trains on the letters of `scripts`; pairs are of letters of `test_scripts` that look like none of those."""
    size, seed = config.render_size, config.render_seed
    train = glyphs(config.scripts, config.train_per_class, 1, size, seed)
    test = glyphs(config.test_scripts, 1, config.test_per_class, size, seed)
    # A letter of both sets of scripts, or with a lookalike in the other one, is trained on.
    known = "".join(SCRIPTS[script] for script in config.scripts)
    both = letter_shapes("".join(dict.fromkeys(known + "".join(test.classes))))
    trained = {letter for shape in both if set(shape) & set(known) for letter in shape}
    new = [label for label, shape in enumerate(test.classes) if not trained & set(shape)]
    if len(new) < 2 * config.pair_folds:
        raise UserError(
            f"dataset.test_scripts has {len(new)} letters that look like none of dataset.scripts. Each of the "
            f"{config.pair_folds} folds (dataset.pair_folds) needs two or more: add scripts, or take fewer folds."
        )
    train = chosen(train, ~train.is_test)
    test = chosen(test, test.is_test & np.isin(test.labels, new))
    pairs = draw_pairs(test.labels, config.pair_folds, config.pairs_per_fold, seed)
    test = replace(test, classes=tuple(test.classes[label] for label in new))
    return with_pairs("glyph_pairs", train, test, pairs)


def chosen(dataset: Dataset, which: np.ndarray) -> Dataset:
    """The images for which `which`, (N,) bool, is true. Labels and listing stay those of the whole set."""
    kept = np.flatnonzero(which)
    return replace(
        dataset,
        labels=dataset.labels[kept],
        is_test=dataset.is_test[kept],
        names=tuple(dataset.names[index] for index in kept),
        load=lambda index: dataset.load(kept[index]),
    )

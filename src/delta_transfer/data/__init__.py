"""Data sets by name: readers of the publishers' files, and the embedded glyphs."""

from ..config import DatasetConfig, choose
from .cub import cub
from .dataset import Dataset
from .glyphs import glyphs

# dataset.name -> function of the dataset's configuration.
DATASETS = {
    "cub": lambda config: cub(config.root),
    "glyphs": lambda config: glyphs(
        config.scripts, config.train_per_class, config.test_per_class, config.render_size, config.render_seed
    ),
}


def load_dataset(config: DatasetConfig) -> Dataset:
    return choose(DATASETS, "dataset.name", config.name)(config)

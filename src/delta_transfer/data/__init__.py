"""Data sets by name: readers of the publishers' files, and the embedded glyphs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import DatasetConfig, choose
from ..errors import UserError
from .cub import cub
from .dataset import Dataset
from .glyphs import glyphs


@dataclass(frozen=True)
class Reader:
    """How one data set is read. `read(root, config)` may rely on `needs` being there."""

    read: Callable[[Path | None, DatasetConfig], Dataset]
    title: str
    needs: tuple[str, ...] = ()  # what lies below dataset.root in the publisher's layout
    source: str = ""  # where a person gets it
    archives: tuple[str, ...] = ()  # the publisher's archives, which delta-data prepare unpacks
    download: Callable[[Path], None] | None = None  # torchvision's download into dataset.root, checksummed


def _glyphs(root: None, config) -> Dataset:
    return glyphs(config.scripts, config.train_per_class, config.test_per_class, config.render_size, config.render_seed)


# dataset.name -> how it is read.
DATASETS = {
    "glyphs": Reader(_glyphs, "letters drawn with the fonts that come with matplotlib"),
    "cub": Reader(
        cub,
        "CUB-200-2011",
        needs=("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt", "images"),
        source="CUB_200_2011.tgz (1.1 GB) from https://data.caltech.edu/records/65de6-vp158",
        archives=("CUB_200_2011.tgz",),
    ),
}


def load_dataset(config: DatasetConfig) -> Dataset:
    """Reads the lists, not the images. Raises UserError that says what is missing and where to get it."""
    reader = choose(DATASETS, "dataset.name", config.name)
    root = Path(config.root).expanduser() if config.root else None
    if config.download:
        if reader.download is None:
            raise UserError(f"{reader.title} has no download: {_how_to_get(reader)}.")
        reader.download(root)
    if reader.needs:
        _check_layout(reader, root)
    return reader.read(root, config)


def _check_layout(reader: Reader, root: Path | None) -> None:
    absent = [name for name in reader.needs if root is None or not (root / name).exists()]
    if not absent:
        return
    if root is None:
        found = "dataset.root is not set"
    elif not root.is_dir():
        found = f"there is no folder {root}"
    else:
        found = f"{root} lacks {', '.join(absent)}"
        others = [r.title for r in DATASETS.values() if r.needs and all((root / name).exists() for name in r.needs)]
        if others:
            found += f" (it looks like {' or '.join(others)})"
    raise UserError(
        f"{reader.title} was not found: {found}. {_how_to_get(reader)}, and pass its folder as "
        f"dataset.root=DIR; it must hold {', '.join(reader.needs)}."
    )


def _how_to_get(reader: Reader) -> str:
    if reader.download is not None:
        return "Let torchvision fetch it with dataset.download=true"
    unpack = ", unpack it (or let delta-data prepare do so)" if reader.archives else ""
    return f"Get {reader.source}{unpack}"

"""Data sets by name: where they are, fetching them, reading them. The table of all of them is in readers.py."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from ..common.errors import UserError
from ..common.options import choose, require
from ..config import DatasetConfig
from .dataset import Dataset
from .readers.table import DATASETS, Reader
from .readers.torchvision_sets import reason

__all__ = ["DATASETS", "Dataset", "Reader", "fetch", "load_dataset", "locate"]


def load_dataset(config: DatasetConfig, cache_dir: Path | None = None) -> Dataset:
    """Reads the lists, not the images. Raises UserError that says what is missing and where to get it.

    `cache_dir`: where digests of the images' files are remembered, so that they are not all read each time.
    """
    reader = choose(DATASETS, "dataset.name", config.name)
    require(
        isinstance(config, reader.schema),
        f"dataset.name={config.name} needs options that this file of conf/dataset lacks: choose a data set by "
        f"dataset={config.name}, or set the schema of yours.",
    )
    root = Path(config.root).expanduser() if config.root else None
    root = locate(reader, root)
    if config.download:
        fetch(reader, root)
    if reader.needs:
        _check_layout(reader, root)
    return replace(reader.read(root, config), cache_dir=cache_dir)


def locate(reader: Reader, root: Path | None) -> Path | None:
    """The folder that holds what the reader needs: `root`, or the one that a person is likely to have meant.

    That is the folder around it, if the data set's own folder was passed (/data/food-101), or the folder of the same
    name inside it, if the archive was unpacked there (/data/CUB_200_2011/CUB_200_2011).
    """
    if root is None or not reader.needs or all((root / name).exists() for name in reader.needs):
        return root
    own, parent = root.absolute().name, root.absolute().parent
    if all(name.startswith(f"{own}/") and (parent / name).exists() for name in reader.needs):
        return parent
    return root / own if all((root / own / name).exists() for name in reader.needs) else root


@cache  # once per sweep: checking what is there already reads gigabytes
def fetch(reader: Reader, root: Path | None) -> None:
    """torchvision's download. Raises UserError if there is none or if it fails."""
    if reader.download is None:
        raise UserError(f"{reader.title} has no download: {_how_to_get(reader)}.")
    if root is None:
        raise UserError(f"dataset.download=true needs dataset.root=DIR, the folder to put {reader.title} into.")
    try:
        reader.download(root)
    except UserError:
        raise
    except Exception as error:  # of the network, the archive, the disk, or the lists once they are there
        raise UserError(
            f"torchvision could not fetch {reader.title} into {root} ({reason(error)}). Check the network connection "
            f"and the free disk space, or get {reader.source}."
        ) from error


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
        # A data set with a folder of its own below root says nothing about root.
        flat = [r for r in DATASETS.values() if r.needs and "/" not in r.needs[0]]
        others = [r.title for r in flat if all((root / name).exists() for name in r.needs)]
        if others:
            found += f" (it looks like {' or '.join(others)})"
    raise UserError(
        f"{reader.title} was not found: {found}. {_how_to_get(reader)}, and pass its folder as "
        f"dataset.root=DIR; it must hold {', '.join(reader.needs)}."
    )


def _how_to_get(reader: Reader) -> str:
    fetch = "Let torchvision fetch it with dataset.download=true, or get" if reader.download else "Get"
    unpack = " and unpack (delta-data prepare does so too)" if reader.archives else ""
    return f"{fetch} {reader.source}{unpack}"

"""Data sets by name: where they are, fetching them, reading them. Each reader registers itself in its own file."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache, lru_cache
from importlib import resources
from os.path import exists  # False for an impossible name, too
from pathlib import Path

import yaml

from ..common.console import log_once
from ..common.errors import UserError
from ..common.options import require
from . import readers  # noqa: F401  (registers all readers)
from .dataset import Dataset, counts_of, expected_counts
from .examination import unreadable_images
from .images import Reading, allow_pixels, read_image
from .options import Counts, DatasetConfig
from .readers.lists import ListsConfig
from .readers.torchvision_sets import reason
from .registry import READERS, Publication
from .tree import remarks

__all__ = [
    "READERS",
    "Dataset",
    "Publication",
    "datasets_of",
    "fetch",
    "load_dataset",
    "load_once",
    "locate",
    "look_for",
    "publication",
]


def load_dataset(
    config: DatasetConfig, cache_dir: Path | None = None, remark: Callable[[str], None] = log_once
) -> Dataset:
    """Reads the lists, not the images. Raises UserError that says what is missing and where to get it.

    Args:
        cache_dir: where digests of the images' files are remembered, so that they are not all read each time.
        remark: called with a sentence about each file that is left out and each possible surprise. By default
            a process logs each of them once.
    """
    found = READERS[config.reader]
    require(
        isinstance(config, found.options),
        f"dataset.reader={config.reader} needs options that this file of conf/dataset lacks: choose a data set by "
        f"dataset={config.reader}, or set the schema of yours.",
    )
    published = publication(config)
    root = locate(published, Path(config.root).expanduser() if config.root else None)
    if config.download:
        fetch(published, root)
    if published.needs:
        _check_layout(published, root)
    dataset = replace(found.thing.read(root, config), cache_dir=cache_dir)
    if dataset.files:
        dataset = _read_as(dataset, config)
    for sentence in dataset.remarks:
        remark(sentence)
    return dataset


@lru_cache(maxsize=1)
def datasets_of(began: int) -> dict[str, Dataset]:
    """The data sets that this process has read for the command that began at this time. Each worker has its own."""
    return {}


def load_once(config: DatasetConfig, cache_dir: Path, datasets: dict[str, Dataset]) -> Dataset:
    """The data set, from `datasets` if it is there already. Raises UserError as `load_dataset` does."""
    key = repr((config.replace(download=False), cache_dir))  # fetched or not, the data set is the same
    if key not in datasets:
        datasets[key] = load_dataset(config, cache_dir)
    return datasets[key]


def _read_as(dataset: Dataset, config: DatasetConfig) -> Dataset:
    """The data set whose image files are read as the options say."""
    reading, files = Reading(config.scale, config.max_pixels), dataset.files
    allow_pixels(config.max_pixels)
    scaled = f" scale={config.scale}" if config.scale is not None else ""
    listing = hashlib.sha256((dataset.listing + scaled).encode()).hexdigest() if scaled else dataset.listing
    dataset = replace(dataset, load=lambda index: read_image(files[index], reading), listing=listing)
    if config.unreadable == "refuse":
        return dataset
    require(dataset.pairs is None, "dataset.unreadable=skip: pairs name their images, and none can be left out.")
    if not (bad := unreadable_images(dataset, str(reading))):
        return dataset
    named = {dataset.names[index]: f"cannot be read ({why})" for index, why in bad.items()}
    return replace(dataset.without(bad), remarks=(*dataset.remarks, *remarks(dataset.name, named)))


def look_for(
    config: DatasetConfig, remark: Callable[[str], None] = log_once
) -> tuple[Counts | None, Counts | None, str, str | None]:
    """The counts that are here, the publisher's counts, the state in a word, and why the data set cannot be used."""
    published = publication(config)
    root = locate(published, Path(config.root).expanduser()) if config.root else None
    official = expected_counts(config)
    if not published.needs or any((root / need).exists() for need in published.needs if root):
        try:
            counts = counts_of(load_dataset(config, remark=remark))
            return counts, official, counts.against(official), None
        except UserError as error:
            if root is not None:
                return None, official, "not usable", str(error)
    return None, official, "not here", None


def publication(config: DatasetConfig) -> Publication:
    """What the publisher of a data set provides, from its reader or its own options."""
    return config.publication(READERS[config.reader].thing.publication)


def locate(published: Publication, root: Path | None) -> Path | None:
    """The folder that holds what the reader needs: `root`, or the one that a person is likely to have meant.

    That is the folder around it, if the data set's own folder was passed (/data/food-101), or the folder of the same
    name inside it, if the archive was unpacked there (/data/CUB_200_2011/CUB_200_2011).
    """
    needs = published.needs
    if root is None or not needs or all(exists(root / name) for name in needs):
        return root
    own, parent = root.absolute().name, root.absolute().parent
    if all(name.startswith(f"{own}/") and exists(parent / name) for name in needs):
        return parent
    return root / own if all(exists(root / own / name) for name in needs) else root


@cache  # once per sweep: checking what is there already reads gigabytes
def fetch(published: Publication, root: Path | None) -> None:
    """torchvision's download. Raises UserError if there is none or if it fails."""
    if published.download is None:
        raise UserError(f"{published.title} has no download: {_how_to_get(published)}.")
    if root is None:
        raise UserError(f"dataset.download=true needs dataset.root=DIR, the folder to put {published.title} into.")
    try:
        published.download(root)
    except UserError:
        raise
    except Exception as error:  # the network, the archive, the disk or the downloaded lists can fail
        raise UserError(
            f"torchvision could not fetch {published.title} into {root} ({reason(error)}). Check the network "
            f"connection and the free disk space, or get {published.source}."
        ) from error


def _check_layout(published: Publication, root: Path | None) -> None:
    absent = [name for name in published.needs if root is None or not exists(root / name)]
    if not absent:
        return
    if root is None:
        found = "dataset.root is not set"
    elif not root.is_dir():
        found = f"there is no folder {root}"
    else:
        found = f"{root} lacks {', '.join(absent)}"
        # A publisher's folder below root does not tell which data set root holds.
        flat = [other for other in _publications() if other.needs and "/" not in other.needs[0]]
        if others := [other.title for other in flat if all(exists(root / name) for name in other.needs)]:
            found += f" (it looks like {' or '.join(others)})"
    raise UserError(
        f"{published.title} was not found: {found}. {_how_to_get(published)}, and pass its folder as "
        f"dataset.root=DIR; it must hold {', '.join(published.needs)}."
    )


def _publications() -> Iterator[Publication]:
    """The publications of all readers, and of all data sets of conf/dataset that have list files."""
    yield from (READERS[name].thing.publication for name in READERS)
    own = {entry.name for entry in fields(ListsConfig)}
    for file in resources.files("delta_transfer.conf").joinpath("dataset").iterdir():
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if values.get("reader") == "lists":
            yield publication(ListsConfig(**{name: value for name, value in values.items() if name in own}))


def _how_to_get(published: Publication) -> str:
    fetch = "Let torchvision fetch it with dataset.download=true, or get" if published.download else "Get"
    unpack = " and unpack (delta-data prepare does so too)" if published.archives else ""
    return f"{fetch} {published.source}{unpack}"

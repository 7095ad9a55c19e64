"""The readers of data sets, by the names that `dataset.reader` gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.options import Registry
from .dataset import Dataset
from .options import DatasetConfig, Publication

Read = Callable[[Any, Any], Dataset]  # (root, config) -> Dataset


@dataclass(frozen=True)
class Reader:
    """How a format is read. `read(root, config)` may rely on `publication.needs` being there."""

    read: Read
    publication: Publication


READERS: Registry[Reader] = Registry("dataset.reader")


def reader(
    name: str,
    *,
    title: str,
    options: type[DatasetConfig] = DatasetConfig,
    needs: tuple[str, ...] = (),
    source: str = "",
    archives: tuple[str, ...] = (),
    download: Callable[[Path], None] | None = None,
) -> Callable[[Read], Read]:
    """A decorator that makes a function (root, config) -> Dataset the reader `name`. See `Publication`."""

    def add(read: Read) -> Read:
        READERS.register(name, title, options)(Reader(read, Publication(title, needs, source, archives, download)))
        return read

    return add

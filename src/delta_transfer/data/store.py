"""Every image decoded once, into one memory-mapped uint8 array on disk.

A store is a folder: `pixels` and `sizes` of all images, `checksums` (crc32 of each image's pixels), and `store.json`,
which describes its data set and names its images of one colour. Checksums are compared by `delta-data verify`, and when
size or time of the file of pixels have changed since the build. A damaged store is built again.
"""

import atexit
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from time import sleep
from typing import TypeVar

import numpy as np
from PIL import Image

from ..common import cores
from ..common.console import log, shorten_list
from ..common.errors import UserError
from ..records.files import naming, sync_folder, write_atomically
from ..records.locks import Check, wait_for_lock
from .contents import cannot_be_read
from .dataset import Dataset
from .images import UNREADABLE

# Raise when the decoded pixels or the layout of the files change, so that older stores are not used.
VERSION = 3
AT_ONCE = 16  # images that a process decodes before it sends them
T = TypeVar("T")
Decoded = tuple[np.ndarray, int]  # an image (H, W, 3) uint8 and the crc32 of its pixels
SYNC_BYTES = 64 * 2**20  # written between two flushes to disk: a crash loses no more than that


@dataclass(frozen=True)
class Store:
    """Decoded images, one after the other, each row by row."""

    pixels: np.ndarray  # (P, 3) uint8, read-only memory map
    sizes: np.ndarray  # (N, 2) int64: height and width of each image
    known_constant: np.ndarray | None = None  # what `constant` found when the store was built

    @classmethod
    def of(cls, images: Sequence[np.ndarray]) -> "Store":
        """The store of images (H, W, 3) uint8 in memory."""
        sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
        return cls(np.concatenate([image.reshape(-1, 3) for image in images]), sizes)

    @property
    def starts(self) -> np.ndarray:
        """(N,) int64: index of each image's first pixel."""
        return np.cumsum(self.sizes.prod(axis=1)) - self.sizes.prod(axis=1)

    def constant(self) -> np.ndarray:
        """Indices of the images of one colour only. To find them reads most of the store."""
        if self.known_constant is not None:
            return self.known_constant
        counts = self.sizes.prod(axis=1)
        some = (self.starts[:, None] + counts[:, None] * np.arange(16) // 16).ravel()  # most images differ there
        pixels = np.asarray(self.pixels[some]).reshape(-1, 16, 3)
        alike = np.flatnonzero((pixels == pixels[:, :1]).all(axis=(1, 2)))
        whole = [self.pixels[self.starts[index] :][: counts[index]] for index in alike]
        return alike[[bool((image == image[0]).all()) for image in whole]]


def open_store(
    dataset: Dataset, size: int, aspect: str, cache_dir: Path, progress: Callable[[int], None] = lambda done: None
) -> Store:
    """The store of `dataset`, built under `cache_dir`/stores on first use.

    Args:
        size: pixels. aspect "squash": every image becomes size x size. "keep": its shorter side becomes `size`.
            Bilinear, or bicubic with "squash-bicubic" and "keep-bicubic".
        progress: called with the number of images done.

    An interrupted build goes on where it stopped, and a damaged store is built again; a lock keeps two processes from
    building at once. Raises UserError for unreadable images and for files that changed meanwhile, all of which it
    names, and for a disk without room for the store.
    """
    path = store_path(dataset, size, aspect, cache_dir)
    if _usable(path, dataset) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(path.with_name(f".{path.name}.lock"), f"builds {path.name}") as check:
            why = _usable(path, dataset)
            if why is not None:  # otherwise another process has just built it
                if path.exists():
                    log.info(f"The store {path} is damaged ({why}): it is built again")
                    shutil.rmtree(path)
                unfinished = _unfinished(path)
                _build(dataset, size, aspect, unfinished, progress, check)
                os.replace(unfinished, path)
                sync_folder(path.parent)
    known = json.loads((path / "store.json").read_text()).get("constant")
    return _read(path) if known is None else replace(_read(path), known_constant=np.array(known, dtype=np.int64))


def _read(path: Path) -> Store:
    sizes = np.fromfile(path / "sizes", dtype=np.int64).reshape(-1, 2)
    return Store(np.memmap(path / "pixels", dtype=np.uint8, mode="r").reshape(-1, 3), sizes)


def _usable(path: Path, dataset: Dataset) -> str | None:
    """Why the store cannot be used; None if it can."""
    try:
        made = json.loads((path / "store.json").read_text())
        sizes = np.fromfile(path / "sizes", dtype=np.int64).reshape(-1, 2)
        if made["fingerprint"] != dataset.fingerprint or len(sizes) != len(dataset.labels):
            return "it holds other images"
        if (path / "pixels").stat().st_size != 3 * sizes.prod(axis=1).sum():
            return "its file of pixels is cut off"
        if made["pixels"] != _stamp(path) or "constant" not in made:  # moved here, changed, or of an earlier version
            damaged = wrong_checksums(path)
            if damaged:
                return f"checksums are wrong: {shorten_list([dataset.names[index] for index in damaged])}"
            with suppress(OSError):  # if the disk cannot be written, the checksums are compared again next time
                _describe(path, dataset)
    except FileNotFoundError as error:
        return f"there is no {Path(error.filename).name}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def wrong_checksums(path: Path) -> list[int]:
    """Indices of the images whose pixels in the store differ from those that were decoded."""
    store = _read(path)
    expected = np.fromfile(path / "checksums", dtype=np.uint32)
    if len(expected) != len(store.sizes):
        raise ValueError("the number of checksums is wrong")
    ends = store.starts + store.sizes.prod(axis=1)
    with ThreadPoolExecutor(cores.USABLE) as pool:
        found = pool.map(lambda start, end: zlib.crc32(store.pixels[start:end].data), store.starts, ends)
        return [index for index, checksum in enumerate(found) if checksum != expected[index]]


def _describe(folder: Path, dataset: Dataset) -> None:
    """Writes store.json, last."""
    made = {"version": VERSION, "dataset": dataset.name, "fingerprint": dataset.fingerprint, "pixels": _stamp(folder)}
    made["constant"] = _read(folder).constant().tolist()
    write_atomically(folder / "store.json", json.dumps(made).encode())


def _stamp(folder: Path) -> list[int]:
    status = (folder / "pixels").stat()
    return [status.st_size, status.st_mtime_ns]


def store_path(dataset: Dataset, size: int, aspect: str, cache_dir: Path) -> Path:
    """The folder of the finished store. Its name follows from everything that decides its bytes."""
    key = hashlib.sha256(f"{VERSION} {aspect} {size} {dataset.fingerprint}".encode()).hexdigest()[:16]
    return cache_dir / "stores" / f"{dataset.name}-{aspect}-{size}px-{key}"


def bytes_to_write(path: Path, count: int, size: int, aspect: str) -> int:
    """Bytes that a build of the store `path` of `count` images has yet to write."""
    return store_bytes(count - _done(_unfinished(path)), size, aspect)


def store_bytes(count: int, size: int, aspect: str) -> int:
    """Bytes on disk; for aspect "keep" an estimate for images of 3:4."""
    return count * size * size * 3 * (4 if aspect.startswith("keep") else 3) // 3


def fit(image: Image.Image, size: int, aspect: str) -> Image.Image:
    """The image as size x size, or with `size` as its shorter side (the longer one rounded down); see `open_store`."""
    width, height = image.size
    if aspect.startswith("squash"):
        target = (size, size)
    elif width <= height:
        target = (size, size * height // width)
    else:
        target = (size * width // height, size)
    if Image.MAX_IMAGE_PIXELS and target[0] * target[1] > Image.MAX_IMAGE_PIXELS:  # a line of pixels, enlarged
        raise ValueError(f"{width} x {height} pixels would become {target[0]} x {target[1]}")
    bicubic = aspect.endswith("-bicubic")
    return image.resize(target, Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR)


def _build(
    dataset: Dataset, size: int, aspect: str, folder: Path, progress: Callable[[int], None], check: Check
) -> None:
    """Writes a store into `folder`. The file `done` has the number of images that an earlier build left on disk."""
    done = _resume(folder)
    count = len(dataset.labels)
    needed = store_bytes(count - done, size, aspect)
    if needed > shutil.disk_usage(folder).free:
        raise UserError(
            f"The store of {dataset.name} needs {needed / 2**30:.1f} GiB more in {folder.parent} (cache_dir)."
        )
    unreadable: list[str] = []
    with (
        naming(folder),
        open(folder / "pixels", "ab") as pixels,
        open(folder / "sizes", "ab") as sizes,
        open(folder / "checksums", "ab") as checksums,
        ThreadPoolExecutor(1) as flusher,  # waits for the disk, while the next images are decoded
    ):
        flushed: Future[None] | None = None
        unsynced = 0

        def flush(whole: int) -> None:
            for file in (pixels, sizes, checksums):
                os.fsync(file.fileno())
            write_atomically(folder / "done", json.dumps(whole).encode())

        for index, found in decoded(dataset, size, aspect, done):
            progress(index + 1)
            if isinstance(found, ValueError):
                unreadable.append(f"{dataset.names[index]} ({found})")
                continue
            if unreadable:  # the other images are decoded only to name all that cannot be read
                continue
            image, checksum = found
            pixels.write(image.data)
            sizes.write(np.array(image.shape[:2], dtype=np.int64).data)
            checksums.write(np.uint32(checksum).data)
            unsynced += image.nbytes
            if unsynced > SYNC_BYTES or index + 1 == count:
                check()
                if flushed:
                    flushed.result()
                for file in (pixels, sizes, checksums):
                    file.flush()
                flushed = flusher.submit(flush, index + 1)
                unsynced = 0
        if flushed:
            flushed.result()
    changed = dataset.changed_files()
    if unreadable or changed:
        shutil.rmtree(folder)
    if unreadable:
        raise cannot_be_read(dataset.name, unreadable)
    if changed:
        raise UserError(
            f"{len(changed)} images of {dataset.name} changed while they were decoded: {shorten_list(changed)}."
        )
    _describe(folder, dataset)
    (folder / "done").unlink()


def _resume(folder: Path) -> int:
    """Number of images that an interrupted build wrote completely. Cuts off the rest of its files."""
    folder.mkdir(exist_ok=True)
    try:
        done = _done(folder)
        sizes = np.fromfile(folder / "sizes", dtype=np.int64)[: 2 * done].reshape(done, 2)
        for name, size in (
            ("sizes", 16 * done),
            ("checksums", 4 * done),
            ("pixels", 3 * int(sizes.prod(axis=1).sum())),
        ):
            if (folder / name).stat().st_size < size:
                raise ValueError("shorter than what was safely on disk")
            os.truncate(folder / name, size)
    except (OSError, ValueError, TypeError):
        for name in ("done", "pixels", "sizes", "checksums"):
            (folder / name).unlink(missing_ok=True)
        return 0
    return done


def _unfinished(path: Path) -> Path:
    """The folder in which the store `path` is built."""
    return path.with_name(f".{path.name}.partial")


def _done(folder: Path) -> int:
    """Number of images that the build in `folder` says are safely on disk."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        return int(json.loads((folder / "done").read_text()))
    return 0


def decoded(dataset: Dataset, size: int, aspect: str, first: int = 0) -> Iterator[tuple[int, Decoded | ValueError]]:
    """Yields (index, what was decoded or why nothing was) from `first` on, in order. All cores decode ahead."""

    def decode(index: int) -> Decoded | ValueError:
        try:
            image = np.asarray(fit(dataset.load(index), size, aspect))
        except UNREADABLE as error:
            return ValueError(str(error) or type(error).__name__)  # not all exceptions pass to another process
        return image, zlib.crc32(image.data)

    indices = range(first, len(dataset.labels))
    workers = min(cores.USABLE, len(indices) // AT_ONCE)
    # Pillow holds Python's global lock for more than a quarter of the time, so that four threads are the most that pay.
    # Processes take 8 % more processor time. Only a forked process has the data set without pickling it.
    if workers > 4 and multiprocessing.get_all_start_methods()[0] == "fork":  # the system's default
        return _in_processes(decode, indices, workers)
    return _in_threads(decode, indices, cores.USABLE)


def _in_threads(decode: Callable[[int], T], indices: range, workers: int) -> Iterator[tuple[int, T]]:
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[tuple[int, Future[T]]] = deque()
        for index in indices:
            ahead.append((index, pool.submit(decode, index)))
            if len(ahead) > 8 * workers:  # bounds memory
                index, future = ahead.popleft()
                yield index, future.result()
        for index, future in ahead:
            yield index, future.result()


def _in_processes(decode: Callable[[int], T], indices: range, workers: int) -> Iterator[tuple[int, T]]:
    import torch
    from torch.utils.data import DataLoader

    def found(batch: list[int]) -> list[tuple[int, T]]:
        return [(index, decode(index)) for index in batch]

    parent = os.getpid()
    loader: DataLoader[list[tuple[int, T]]] = DataLoader(
        indices,  # type: ignore[arg-type]  # a range is a data set
        AT_ONCE,
        collate_fn=found,
        num_workers=workers,
        worker_init_fn=lambda worker: _end_with(parent),
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else it draws the workers' seed from the program's own random numbers
    )
    ahead = iter(loader)
    # At its exit Python sends SIGTERM to workers that are left, which they ignore, and would wait for them for ever.
    end: Callable[[], None] = ahead._shutdown_workers  # type: ignore[attr-defined]
    atexit.register(end)
    try:
        for batch in ahead:
            yield from batch
    except RuntimeError as error:  # errors of images are values here: a worker has ended
        raise UserError(f"A process that decodes images was killed, perhaps since memory ran out ({error}).") from error
    finally:
        end()
        atexit.unregister(end)


def _end_with(parent: int) -> None:
    """Lets a worker end with its parent alone.

    A terminal sends Ctrl-C to the workers too, which the parent would take for a fault. Without `watch`, workers of a
    killed parent wait for ever until somebody reads what they send.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            sleep(1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()

"""Batches on the device: crops and mirror images cut from the store, normalised there.

The images of a batch and their crops follow from (seed, stream, iteration) alone: all methods of one seed see the same
batches, and a resumed run goes on with the batch that it would have seen.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.console import log
from .jitter import Jitter
from .store import Store

# Streams of random numbers that must not influence one another. `fit`: batches that a method sees before training.
STREAMS = {"train": 0, "fit": 1, "dropout": 2, "method": 3, "jitter": 4}
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # images (B,), boxes (4, B) and mirroring (B,)


def images_at_once(device: torch.device, size: Sequence[int] = ()) -> int:
    """How many images of this size (height, width) go through a frozen network together, if the program may choose.

    A GPU takes many. A CPU takes so few that their feature maps stay in its caches: for each thread 4 images of
    224 x 224 pixels, or 64 of 32 x 32, which are twice as fast as 4.
    """
    if device.type == "cuda":
        return 256
    pixels = size[0] * size[1] if len(size) == 2 else 224**2  # other inputs are no images
    return 4 * min(max(224**2 // pixels, 1), 16) * torch.get_num_threads()


def free_memory(device: torch.device | None = None) -> int:
    """Bytes of a GPU's memory that are free, or that PyTorch holds for reuse, such as those of an earlier run."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


class BatchSource:
    """Batches of a data set, on the device. The order follows from (seed, stream, iteration) alone.

    A subclass makes batches of indices (`drawn_batch`, `test_batches`). share: the part of every training batch that
    this process makes, if several processes share a batch.
    """

    batch_size: int
    seed: int
    device: torch.device
    share: slice
    ten_crops = False
    views = 1  # test crops of an image
    images_at_once: int  # in evaluation

    def train_batch(self, indices: np.ndarray, iteration: int) -> tuple[Any, Tensor]:
        """Inputs and labels (B, ...): this process's share of batch `iteration`."""
        return self.drawn_batch(indices, iteration, "train", self.seed, self.share)

    def train_view(self, indices: np.ndarray, iteration: int, view: int) -> Any:
        """The inputs of `train_batch` with a new augmentation for each `view` from 1 on."""
        return self.drawn_batch(indices, iteration, "train", self.seed, self.share, view)[0]

    def drawn_batch(
        self, indices: np.ndarray, iteration: int, stream: str, seed: int, share: slice = slice(None), view: int = 0
    ) -> tuple[Any, Tensor]:
        """A training batch of a stream of random numbers."""
        raise NotImplementedError

    def test_batches(self, indices: np.ndarray, ten_crops: bool | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Inputs and labels in the order of `indices`, without augmentation."""
        raise NotImplementedError

    def order(self, indices: np.ndarray, iteration: int, stream: str, seed: int) -> np.ndarray:
        """The inputs (B,) of a batch. Shuffled passes over `indices` follow one another, cut into full batches."""
        position = iteration * self.batch_size + np.arange(self.batch_size)
        epoch, offset = position // len(indices), position % len(indices)
        chosen = np.empty(self.batch_size, dtype=np.int64)
        for number in np.unique(epoch):
            order = _generator(seed, stream, 0, number).permutation(indices)
            chosen[epoch == number] = order[offset[epoch == number]]
        return chosen

    def passes(self, indices: np.ndarray, stream: str, seed: int, batch_size: int | None = None) -> "Passes":
        """Training batches as an iterable. Each iteration over it is one further pass over `indices`.

        batch_size: inputs per batch; None: as many as in training.
        """
        source = copy(self)
        source.batch_size = batch_size or self.batch_size
        return Passes(source, indices, stream, seed)

    def centres(self, indices: np.ndarray) -> "Centres":
        """The inputs of `indices` without augmentation (centre crops), in their order, as an iterable of batches."""
        return Centres(self, indices)

    def step_seed(self, iteration: int) -> int:
        """Seed of the network's own randomness (dropout) in training step `iteration`. Each process has its own."""
        return int(_generator(self.seed, "dropout", self.share.start or 0, iteration).integers(2**63))

    def method_seed(self, iteration: int) -> int:
        """Seed of a method's draws before training step `iteration`. It is the same in all processes."""
        return int(_generator(self.seed, "method", 0, iteration).integers(2**63))


class Loader(BatchSource):
    """Random crops and mirror images for training; the centre crop, or ten crops, for evaluation.

    Args:
        store: decoded images.
        labels: (N,) int64.
        crop: side of the crop in pixels.
        mirror: whether training images are mirrored at random (and test crops too, if there are ten).
        mean, std: per channel, of images scaled to 0..1.
        batch_size: images per batch; every training batch is full.
        seed: seed of order and augmentation.
        device: makes the batches. The store is copied there if it is a GPU with room for it.
        min_crop_area: None for crops of crop x crop pixels; else random resized crops, a box with this fraction of
            the image's area or more and sides of 3:4 to 4:3, resized to crop x crop (torchvision's RandomResizedCrop).
        pad: pixels of black around training images that crops of crop x crop pixels may reach into.
        whole: evaluate on the whole image, resized to crop x crop, instead of on the centre.
        jitter: changes of the colours of training images.
        ten_crops: evaluate on the four corners and the centre, each also mirrored, instead of on the centre.
        share: the images of every training batch that this process makes, if several processes share a batch.
    """

    def __init__(
        self,
        store: Store,
        labels: np.ndarray,
        *,
        crop: int,
        mirror: bool,
        mean: list[float],
        std: list[float],
        batch_size: int,
        seed: int,
        device: torch.device,
        min_crop_area: float | None = None,
        pad: int = 0,
        ten_crops: bool = False,
        whole: bool = False,
        jitter: Jitter | None = None,
        share: slice = slice(None),
    ):
        self.crop, self.mirror, self.batch_size, self.seed, self.device = crop, mirror, batch_size, seed, device
        self.min_crop_area, self.pad, self.ten_crops, self.share = min_crop_area, pad, ten_crops, share
        self.whole, self.jitter = whole, jitter
        self.views = 5 * (1 + mirror) if ten_crops else 1
        self.images_at_once = images_at_once(device, (crop, crop))  # in evaluation
        self.heights, self.widths = store.sizes.T
        self.starts = store.starts
        self.labels = torch.from_numpy(labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that the store is read-only; nothing here writes to it
            self.pixels = torch.from_numpy(store.pixels)
        if device.type == "cuda":
            needed, left = store.pixels.nbytes, free_memory(device)
            if needed < 0.5 * left:
                self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)
            else:
                sizes = f"its {needed / 2**30:.1f} GiB are more than half of the {left / 2**30:.1f} GiB that are free"
                log.info(f"The image store stays in main memory, which is slower: {sizes} on the GPU")
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.scale = (1 / (255 * torch.tensor(std))).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).to(device)

    def drawn_batch(
        self, indices: np.ndarray, iteration: int, stream: str, seed: int, share: slice = slice(None), view: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, crop, crop) fp32 channels_last and labels (B,), with crops and mirroring of their own by view.

        A step splits a batch into micro-batches after it was made, so these do not change its images.
        """
        chosen, boxes, mirrored = self._drawn(indices, iteration, stream, seed, view)
        images, labels = self._batch(chosen[share], boxes[:, share], mirrored[share])
        if self.jitter is not None and stream == "train":
            random = _generator(seed, "jitter", view, iteration).random((self.batch_size, 3))[share]
            # Undoes the normalisation, since jitter works on pixels in 0..1.
            scale, shift = (255 * self.scale).view(3, 1, 1), self.shift.view(3, 1, 1)
            pixels = (images - shift) / scale
            images = self.jitter.apply(pixels, torch.from_numpy(random).to(images)) * scale + shift
        return images, labels

    def _drawn(self, indices: np.ndarray, iteration: int, stream: str, seed: int, view: int = 0) -> Drawn:
        """Images (B,), boxes (4, B) and mirroring (B,) of a training batch."""
        chosen = self.order(indices, iteration, stream, seed)
        random = _generator(seed, stream, 1 + view, iteration)
        heights, widths = self.heights[chosen], self.widths[chosen]
        if self.min_crop_area is None:
            room = np.stack([heights, widths]) - self.crop
            boxes = self._square(*random.integers(-self.pad, room + self.pad + 1))
        else:
            boxes = random_boxes(random, heights, widths, self.min_crop_area)
        return chosen, boxes, (random.random(self.batch_size) < 0.5) & self.mirror

    def test_batches(self, indices: np.ndarray, ten_crops: bool | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, 3, crop, crop), the V views of an image one after the other, and the label (B,) of each.

        The images are in the order of `indices`. V is 1 (the centre crop), or with ten crops 10, in torchvision's order
        (5 without mirroring). A batch may end between the views of an image.
        """
        corners, mirrored = self._views(indices, self.ten_crops if ten_crops is None else ten_crops)
        chosen, boxes = indices.repeat(mirrored.size), self._square(*corners.reshape(2, -1))
        if self.whole and ten_crops is None:
            boxes = np.array([0 * indices, 0 * indices, self.heights[indices], self.widths[indices]])
        mirrored = mirrored.repeat(len(indices), 0).ravel()
        step = self.images_at_once
        for start in range(0, len(chosen), step):
            views = slice(start, start + step)
            yield self._batch(chosen[views], boxes[:, views], mirrored[views])

    def _views(self, chosen: np.ndarray, ten_crops: bool) -> tuple[np.ndarray, np.ndarray]:
        """Upper left corners (2, B, V) of the test crops of each image, and whether a crop is mirrored, (1, V)."""
        bottom, right = self.heights[chosen] - self.crop, self.widths[chosen] - self.crop
        top = left = np.zeros_like(bottom)
        middle, centre = np.rint(bottom / 2).astype(np.int64), np.rint(right / 2).astype(np.int64)
        if not ten_crops:
            return np.array([middle, centre])[:, :, None], np.array([[False]])
        rows = np.stack([top, top, bottom, bottom, middle], axis=1)
        columns = np.stack([left, right, left, right, centre], axis=1)
        if not self.mirror:
            return np.array([rows, columns]), np.array([[False] * 5])
        # Column x of the mirrored image is column W - crop - x of the image.
        both = np.array([np.hstack([rows, rows]), np.hstack([columns, right[:, None] - columns])])
        return both, np.array([[False] * 5 + [True] * 5])

    def _square(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Boxes (4, B): row, column, height, width."""
        side = np.full_like(rows, self.crop)
        return np.array([rows, columns, side, side])

    def _batch(self, chosen: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray) -> tuple[Tensor, Tensor]:
        # A blocking copy would wait for the device in every step.
        labels = self.labels[torch.from_numpy(chosen).to(self.labels.device, non_blocking=True)]
        if self.device.type == "cpu":
            return self._normalised(self._crops(chosen, boxes, mirrored), len(chosen)).permute(0, 3, 1, 2), labels
        # On a GPU one gather takes all crops; on a CPU slices are several times as fast.
        gather = self.pixels.is_cuda and bool((boxes[2:] == self.crop).all())
        batch = (self._gathered if gather else self._sliced)(chosen, boxes, mirrored)
        if batch.device.type != self.device.type:  # the store did not fit on the GPU: copy through pinned memory
            batch, labels = (t.pin_memory().to(self.device, non_blocking=True) for t in (batch, labels))
        return (batch.float() * self.scale + self.shift).permute(0, 3, 1, 2), labels

    def _normalised(self, crops: Iterable[Tensor], count: int) -> Tensor:
        """(B, crop, crop, 3) fp32 on a CPU, where access to memory takes most of the time.

        Works image by image, since the cache holds one image over all three operations, and on whole lines of an image
        instead of three numbers at a time.
        """
        batch = _memory(count * self.crop * self.crop * 3).view(count, self.crop, self.crop, 3)
        scale, shift = self.scale.repeat(self.crop), self.shift.repeat(self.crop)
        for image, crop in zip(batch, crops, strict=True):
            image.copy_(crop).view(self.crop, -1).mul_(scale).add_(shift)
        return batch

    def _crops(self, chosen: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray) -> Iterator[Tensor]:
        """Yields each crop, (crop, crop, 3) uint8, resized if its box has another size."""
        for index, (row, column, height, width), flip in zip(chosen, boxes.T, mirrored, strict=True):
            start, stride = self.starts[index], self.widths[index]
            # Rows top..bottom and columns left..right of the box lie in the image: all of them without `pad`.
            top, bottom = max(-row, 0), min(self.heights[index] - row, height)
            left, right = max(-column, 0), min(stride - column, width)
            lines = self.pixels[start + (row + top) * stride : start + (row + bottom) * stride].view(-1, stride, 3)
            box = lines[:, column + left : column + right]
            if box.shape[:2] != (height, width):
                inside, box = box, box.new_zeros(height, width, 3)
                box[top:bottom, left:right] = inside
            if (height, width) != (self.crop, self.crop):
                box = resized(box, self.crop)
            yield box.flip(1) if flip else box

    def _sliced(self, chosen: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """(B, crop, crop, 3) uint8."""
        return torch.stack(list(self._crops(chosen, boxes, mirrored)))

    def _gathered(self, chosen: np.ndarray, boxes: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """(B, crop, crop, 3) uint8 for boxes of crop x crop pixels, in one operation."""
        # Only a few numbers per image: a copy of more than 64 KiB from pageable memory may wait for the device.
        sizes = self.heights[chosen], self.widths[chosen]
        numbers = torch.from_numpy(np.array([self.starts[chosen], *sizes, boxes[0], boxes[1], mirrored]))
        starts, heights, widths, rows, columns, flips = numbers.to(self.pixels.device, non_blocking=True)[:, :, None]
        span = torch.arange(self.crop, device=self.pixels.device)
        rows = rows + span
        columns = columns + torch.where(flips > 0, self.crop - 1 - span, span)
        if not self.pad:
            return self.pixels[(starts + rows * widths)[:, :, None] + columns[:, None, :]]
        inside = ((rows >= 0) & (rows < heights))[:, :, None] & ((columns >= 0) & (columns < widths))[:, None, :]
        lines = starts + rows.clamp(min=0).minimum(heights - 1) * widths
        columns = columns.clamp(min=0).minimum(widths - 1)
        return self.pixels[lines[:, :, None] + columns[:, None, :]] * inside[..., None]


def random_boxes(
    random: np.random.Generator, heights: np.ndarray, widths: np.ndarray, min_area: float, tries: int = 10
) -> np.ndarray:
    """Boxes (4, B) of random resized crops: row, column, height, width.

    The rule is that of torchvision's RandomResizedCrop: area uniform in [min_area, 1] of the image, log of width/height
    uniform between 3/4 and 4/3, the first of ten tries that fits; else the largest centred box of an allowed shape.
    """
    shape = (tries, len(heights))
    area = heights * widths * random.uniform(min_area, 1, shape)
    ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), shape))
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width > 0) & (height > 0) & (width <= widths) & (height <= heights)
    first, everyone = fits.argmax(axis=0), np.arange(len(heights))
    found = fits.any(axis=0)
    width = np.where(found, width[first, everyone], np.minimum(widths, np.rint(heights * 4 / 3))).astype(np.int64)
    height = np.where(found, height[first, everyone], np.minimum(heights, np.rint(widths * 4 / 3))).astype(np.int64)
    room = np.stack([heights - height, widths - width])
    place = np.where(found, random.integers(0, room + 1), room // 2)
    return np.array([*place, height, width])


def resized(box: Tensor, side: int) -> Tensor:
    """(h, w, 3) uint8 -> (side, side, 3), bilinear with antialiasing, as Pillow does it."""
    from torchvision.transforms.v2 import functional  # slow to import

    return functional.resize(box.permute(2, 0, 1), [side, side], antialias=True).permute(1, 2, 0)


class Passes:
    """A re-iterable over training batches: each `for` loop sees the next pass, freshly shuffled and augmented."""

    def __init__(self, loader: BatchSource, indices: np.ndarray, stream: str, seed: int):
        self.loader, self.indices, self.stream, self.seed = loader, indices, stream, seed
        self.next_iteration = self.made = 0

    def __len__(self) -> int:
        return -(-len(self.indices) // self.loader.batch_size)

    def go_to(self, iteration: int, made: int) -> None:
        """Makes the next pass begin with batch `iteration`. An earlier process made `made` batches of that pass."""
        self.next_iteration, self.made = iteration, made

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        left, self.made = len(self) - self.made, 0
        for _ in range(left):
            self.next_iteration += 1
            yield self.loader.drawn_batch(self.indices, self.next_iteration - 1, self.stream, self.seed)


class Centres:
    """A re-iterable over the centre crops of images."""

    def __init__(self, loader: BatchSource, indices: np.ndarray):
        self.loader, self.indices = loader, indices
        self.inputs = len(indices)  # in all batches

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for images, labels in self.loader.test_batches(self.indices, ten_crops=False):
            if isinstance(images, Tensor):  # what is fitted on them does not change with how evaluation is cut
                chunk = images_at_once(labels.device)
                yield from zip(images.split(chunk), labels.split(chunk), strict=True)
            else:
                yield images, labels


def _memory(count: int) -> Tensor:
    """(count,) fp32, not initialised. numpy allocates huge pages; mapping small pages takes longer than filling them.

    The memory is aligned as PyTorch aligns its own, since the order in which a library adds may depend on that.
    """
    memory = np.empty(count + 16, dtype=np.float32)
    start = -memory.ctypes.data % 64 // 4
    return torch.from_numpy(memory[start : start + count])


def _generator(seed: int, stream: str, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, STREAMS[stream], purpose, int(number)))

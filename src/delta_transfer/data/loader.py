"""Batches on the device: a whole batch of crops and flips is one gather from the store.

Which images a batch holds and how they are cropped follows from (seed, stream, iteration) alone: all methods of one
seed see the same batches, and a resumed run goes on with the batch it would have seen.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

# Streams of random numbers that must not influence one another. `fit` is what a regularizer sees before training.
STREAMS = {"train": 0, "fit": 1, "dropout": 2}


class Loader:
    """Random crops and mirror images for training, centre crops for evaluation.

    Args:
        store: decoded images, (N, S, S, 3) uint8.
        labels: (N,) int64.
        crop: side of the crop in pixels, at most S.
        mirror: whether training images are mirrored at random.
        mean, std: per channel, of images scaled to 0..1.
        batch_size: images per batch; every training batch is full.
        seed: of order and augmentation.
        device: where batches are made. The store is copied there when it is a GPU with room for it.
    """

    def __init__(
        self,
        store: np.ndarray,
        labels: np.ndarray,
        *,
        crop: int,
        mirror: bool,
        mean: list[float],
        std: list[float],
        batch_size: int,
        seed: int,
        device: torch.device,
    ):
        self.crop, self.mirror, self.batch_size, self.seed, self.device = crop, mirror, batch_size, seed, device
        self.size = store.shape[1]
        self.labels = torch.from_numpy(labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the store is read-only: nothing here writes to it
            self.images = torch.from_numpy(store)
        if device.type == "cuda" and store.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
            self.images, self.labels = self.images.to(device), self.labels.to(device)
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.scale = (1 / (255 * torch.tensor(std))).to(device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).to(device)

    def train_batch(
        self, indices: np.ndarray, iteration: int, stream: str = "train", seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images (B, 3, crop, crop) fp32 channels_last and labels (B,) of batch number `iteration`.

        The order is one shuffled pass over `indices` after the other, cut into full batches. `seed` stands in for the
        loader's own.
        """
        seed = self.seed if seed is None else seed
        position = iteration * self.batch_size + np.arange(self.batch_size)
        epoch, offset = position // len(indices), position % len(indices)
        chosen = np.empty(self.batch_size, dtype=np.int64)
        for number in np.unique(epoch):
            order = _generator(seed, stream, 0, number).permutation(indices)
            chosen[epoch == number] = order[offset[epoch == number]]
        random = _generator(seed, stream, 1, iteration)
        corners = random.integers(0, self.size - self.crop + 1, size=(2, self.batch_size))
        mirrored = (random.random(self.batch_size) < 0.5) & self.mirror
        return self._gather(chosen, corners, mirrored)

    def passes(self, indices: np.ndarray, stream: str, seed: int) -> "Passes":
        """Training batches as an iterable of which every iteration is one further pass over `indices`."""
        return Passes(self, indices, stream, seed)

    def step_seed(self, iteration: int) -> int:
        """Seed of the network's own randomness (dropout) in training step `iteration`."""
        return int(_generator(self.seed, "dropout", 0, iteration).integers(2**63))

    def centre_batches(self, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Centre crops of `indices` in their order; the last batch may be smaller."""
        corner = (self.size - self.crop) // 2
        for start in range(0, len(indices), self.batch_size):
            chosen = indices[start : start + self.batch_size]
            yield self._gather(chosen, np.full((2, len(chosen)), corner), np.zeros(len(chosen), dtype=bool))

    def _gather(self, chosen: np.ndarray, corners: np.ndarray, mirrored: np.ndarray) -> tuple[Tensor, Tensor]:
        where = self.images.device
        span = np.arange(self.crop)
        columns = corners[1][:, None] + np.where(mirrored[:, None], span[::-1], span)
        index, rows, columns = (
            torch.from_numpy(np.asarray(a, dtype=np.int64)).to(where, non_blocking=True)
            for a in (chosen, corners[0][:, None] + span, columns)
        )
        pixels = self.images[index[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, crop, crop, 3)
        labels = self.labels[index]
        if where.type != self.device.type:  # the store did not fit on the GPU: its batches go through pinned memory
            pixels, labels = (t.pin_memory().to(self.device, non_blocking=True) for t in (pixels, labels))
        return (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2), labels


class Passes:
    """A re-iterable over training batches: each `for` loop sees the next pass, freshly shuffled and augmented."""

    def __init__(self, loader: Loader, indices: np.ndarray, stream: str, seed: int):
        self.loader, self.indices, self.stream, self.seed = loader, indices, stream, seed
        self.next_iteration = 0

    def __len__(self) -> int:
        return -(-len(self.indices) // self.loader.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(len(self)):
            self.next_iteration += 1
            yield self.loader.train_batch(self.indices, self.next_iteration - 1, self.stream, self.seed)


def _generator(seed: int, stream: str, purpose: int, number: int) -> np.random.Generator:
    return np.random.default_rng((seed, STREAMS[stream], purpose, int(number)))

"""Class probabilities of a finished run's network for any image files."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.dataset import Dataset
from ..data.images import Reading, allow_pixels, read_image
from ..data.loader import images_at_once
from ..data.store import Store, decoded
from ..engine.tasks import loader_of, outputs_of
from .finished import Finished


def probabilities(
    run: Finished, files: Sequence[Path], reading: Reading, device: torch.device, batch_size: int | None
) -> Iterator[tuple[Path, np.ndarray | BaseException]]:
    """The probabilities (K,) of each file in order, or the error that prevents them.

    The code that tested the run prepares and evaluates the images, in fp32.
    """
    network = run.network.to(device).to(memory_format=torch.channels_last)
    no_labels = np.full(len(files), -1)
    names = tuple(map(str, files))
    allow_pixels(reading.max_pixels)

    def load(index: int) -> Image.Image:
        return read_image(files[index], reading)

    images = Dataset("images", (), no_labels, no_labels < 0, names, load, listing="")
    outcomes = decoded(images, run.config.backbone.resize, run.config.resizing)
    at_once = batch_size or images_at_once(device)
    while batch := list(islice(outcomes, batch_size or at_once)):
        readable = {index: image for index, image in batch if not isinstance(image, BaseException)}
        found = dict(batch)
        if readable:
            loader = loader_of(run.config, Store.of(list(readable.values())), no_labels, device)
            loader.images_at_once = at_once
            logits, _ = outputs_of(network, loader, np.arange(len(readable)), "logits")
            at_once = loader.images_at_once  # fewer, if memory did not suffice
            found |= dict(zip(readable, logits.double().softmax(dim=1).numpy(), strict=True))
        for index, outcome in found.items():
            yield files[index], outcome

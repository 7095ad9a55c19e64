"""Predictions of a finished run's network for any image files, or for molecules."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.dataset import Dataset
from ..data.graphs import GraphLoader
from ..data.images import Reading, allow_pixels, read_image
from ..data.loader import images_at_once
from ..data.molecules import graph_of, read_molecule
from ..data.packed_graphs import GraphDataset, PackedGraphs, no_picture
from ..data.store import Store, decoded
from ..engine.tasks import TASKS, loader_of, outputs_of
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
        readable = {index: outcome[0] for index, outcome in batch if not isinstance(outcome, BaseException)}
        found: dict[int, Any] = dict(batch)
        if readable:
            loader = loader_of(run.config, Store.of(list(readable.values())), no_labels, device)
            loader.images_at_once = at_once
            logits, _ = outputs_of(network, loader, np.arange(len(readable)), "logits")
            at_once = loader.images_at_once  # fewer, if memory ran out
            found |= dict(zip(readable, TASKS[run.config.task].answers(logits, run.record), strict=True))
        for index, outcome in found.items():
            yield files[index], outcome


def answers_for_molecules(
    run: Finished, smiles: Sequence[str], device: torch.device, batch_size: int | None
) -> list[np.ndarray | ValueError]:
    """The answers (T,) of the run's task for each molecule, or the error that prevents them, in order."""
    found: list[np.ndarray | ValueError] = []
    graphs = []
    for text in smiles:
        try:
            graphs.append(graph_of(read_molecule(text)))
            found.append(np.empty(0))
        except ValueError as error:
            found.append(error)
    if not graphs:
        return found
    none = np.zeros(len(graphs), dtype=np.int64)
    dataset = GraphDataset(
        "molecules", run.class_names, none, none > 0, (), no_picture, "", graphs=PackedGraphs.of(graphs)
    )
    loader = GraphLoader(dataset, batch_size=1, seed=0, device=device)
    loader.images_at_once = batch_size or loader.images_at_once
    logits, _ = outputs_of(run.network.to(device), loader, np.arange(len(graphs)), "logits")
    answers = iter(TASKS[run.config.task].answers(logits, run.record))
    return [one if isinstance(one, ValueError) else next(answers) for one in found]

"""The files that a run leaves beside its record."""

import io
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from .cards import in_words, make_card, metadata_of
from .checked import MODEL, fingerprint, save_with_checksum
from .integrity import DIGESTS, array_digest
from .run_directory import CLASSES, RunDirectory


class Named(Protocol):
    """The names of a data set's classes and of its N images."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def names(self) -> tuple[str, ...]: ...


def write_outputs(
    directory: RunDirectory,
    summary: dict[str, Any],
    measured: Mapping[str, Mapping[str, Any]],
    kinds: Mapping[str, tuple[str, tuple[str, ...]]],
    dataset: Named,
    weights: dict[str, Tensor],
    modules: dict[str, Tensor],
) -> None:
    """Writes predictions, class names, the trained weights and the method's parameters; a model card on request.

    measured: arrays and values by split. kinds: for each split that is kept, its file and the arrays that its digest
    covers. modules: the method's parameters. The summary gets the digests of the written files.
    """
    digests = summary[DIGESTS] = {}
    for split, found in measured.items():
        if split not in kinds:
            continue
        what, kept = kinds[split]
        arrays = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
        digests[what] = array_digest({key: arrays[key] for key in kept})
        if "index" in arrays:
            arrays["names"] = np.array([dataset.names[index] for index in arrays["index"]])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        directory.write(f"{what}.npz", buffer.getvalue())
    directory.write(CLASSES, json.dumps(dataset.classes).encode())
    if modules:
        directory.write("method.safetensors", save_with_checksum(modules))
    metadata: dict[str, str] = {}
    digests["weights"] = fingerprint(weights)
    if summary["config"]["model_card"]:
        card = make_card(summary, dataset.classes, digests["weights"])
        metadata = metadata_of(card)
        directory.write("MODEL_CARD.md", in_words(card).encode())
    directory.write(MODEL, save_with_checksum(weights, metadata))

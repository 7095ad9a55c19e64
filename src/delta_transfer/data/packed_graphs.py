"""Graphs of a data set, concatenated in arrays without torch, since readers make them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..common.errors import UserError
from .dataset import Dataset

Graph = tuple[np.ndarray, np.ndarray, np.ndarray]  # nodes (n, 2), edges (2, e), edge features (e, 2)


@dataclass(frozen=True)
class PackedGraphs:
    """All G graphs of a data set, concatenated."""

    nodes: np.ndarray  # (N, 2) int64
    edges: np.ndarray  # (2, E) int64, indices of nodes within their graph
    edge_features: np.ndarray  # (E, 2) int64
    node_counts: np.ndarray  # (G,) int64
    edge_counts: np.ndarray

    @classmethod
    def of(cls, graphs: Sequence[Graph]) -> "PackedGraphs":
        nodes, edges, features = zip(*graphs, strict=True)
        return cls(
            np.concatenate(nodes).astype(np.int64),
            np.concatenate(edges, axis=1).astype(np.int64),
            np.concatenate(features).astype(np.int64),
            np.array([len(one) for one in nodes], dtype=np.int64),
            np.array([len(one) for one in features], dtype=np.int64),
        )


@dataclass(frozen=True)
class GraphDataset(Dataset):
    """A labelled collection of graphs. `load` raises, since there are no pictures.

    labels: (G,) class of each graph; or (G, T) properties: 1 yes, -1 no, 0 not known; or (G, T) float64 measurements,
    NaN where one is not known. scale: (2, T) mean and standard deviation of measurements over the training graphs.
    """

    graphs: PackedGraphs = field(kw_only=True)
    scale: np.ndarray | None = field(default=None, kw_only=True)


def no_picture(index: int) -> Image.Image:
    """What a GraphDataset loads."""
    raise UserError("Graphs have no pictures.")

"""Batches of graphs of different sizes, on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .loader import BatchSource
from .packed_graphs import GraphDataset, PackedGraphs


@dataclass(frozen=True)
class Graphs:
    """A batch of B graphs, concatenated. Like a tensor it has a device, and can be split.

    Each edge is there in both directions. Node features are (atomic number, chirality) and edge features (bond type,
    direction) as models/graph_networks.py embeds them. Nodes without chemistry have their label as the first feature.
    """

    nodes: Tensor  # (N, 2) int64
    edges: Tensor  # (2, E) int64, from and to, indices into `nodes`
    edge_features: Tensor  # (E, 2) int64
    graph: Tensor  # (N,) int64, the graph of each node
    node_counts: tuple[int, ...]  # of each graph
    edge_counts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.node_counts)

    @property
    def device(self) -> torch.device:
        return self.nodes.device

    def isfinite(self) -> Tensor:
        """True, since all values are integers."""
        return torch.ones((), dtype=torch.bool)

    def split(self, size: int) -> "list[Graphs]":
        """Batches of `size` graphs; the last one may be smaller."""
        node_starts, edge_starts = (list(accumulate(c, initial=0)) for c in (self.node_counts, self.edge_counts))
        parts = []
        for first in range(0, len(self), size):
            last = min(first + size, len(self))
            nodes, edges = (slice(s[first], s[last]) for s in (node_starts, edge_starts))
            parts.append(
                Graphs(
                    self.nodes[nodes],
                    self.edges[:, edges] - node_starts[first],
                    self.edge_features[edges],
                    self.graph[nodes] - first,
                    self.node_counts[first:last],
                    self.edge_counts[first:last],
                )
            )
        return parts

    def chunk(self, count: int) -> "list[Graphs]":
        """At most `count` batches of equal size."""
        return self.split(-(-len(self) // count))


def batch_of(packed: PackedGraphs, chosen: np.ndarray, device: torch.device) -> Graphs:
    """The graphs `chosen` (B,), in that order."""
    node_counts, edge_counts = packed.node_counts[chosen], packed.edge_counts[chosen]
    nodes = _ranges((np.cumsum(packed.node_counts) - packed.node_counts)[chosen], node_counts)
    edges = _ranges((np.cumsum(packed.edge_counts) - packed.edge_counts)[chosen], edge_counts)
    offsets = np.repeat(np.cumsum(node_counts) - node_counts, edge_counts)

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return Graphs(
        on_device(packed.nodes[nodes]),
        on_device(packed.edges[:, edges] + offsets),
        on_device(packed.edge_features[edges]),
        on_device(np.repeat(np.arange(len(chosen)), node_counts)),
        tuple(node_counts.tolist()),
        tuple(edge_counts.tolist()),
    )


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + count - 1 of each pair, concatenated."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def chains(count: int, nodes: int = 25, device: torch.device | str = "cpu") -> Graphs:
    """`count` chains of carbon atoms with the usual size of a drug's molecule, to measure the cost of a step."""
    first = np.arange(nodes - 1)
    edges = np.concatenate([np.array([first, first + 1]), np.array([first + 1, first])], axis=1)
    chain = np.tile([5, 0], (nodes, 1)), edges, np.zeros((edges.shape[1], 2))
    return batch_of(PackedGraphs.of([chain]), np.zeros(count, dtype=np.int64), torch.device(device))


class GraphLoader(BatchSource):
    """Batches of graphs, without augmentation. The seed decides only their order."""

    def __init__(
        self, dataset: GraphDataset, *, batch_size: int, seed: int, device: torch.device, share: slice = slice(None)
    ):
        self.graphs, self.batch_size, self.seed = dataset.graphs, batch_size, seed
        self.device, self.share = device, share
        self.labels = torch.from_numpy(dataset.labels).to(device)
        self.images_at_once = 256

    def drawn_batch(
        self, indices: np.ndarray, iteration: int, stream: str, seed: int, share: slice = slice(None), view: int = 0
    ) -> tuple[Graphs, Tensor]:
        return self._batch(self.order(indices, iteration, stream, seed)[share])

    def test_batches(self, indices: np.ndarray, ten_crops: bool | None = None) -> Iterator[tuple[Graphs, Tensor]]:
        for start in range(0, len(indices), self.images_at_once):
            yield self._batch(indices[start : start + self.images_at_once])

    def _batch(self, chosen: np.ndarray) -> tuple[Graphs, Tensor]:
        return batch_of(self.graphs, chosen, self.device), self.labels[torch.from_numpy(chosen).to(self.device)]

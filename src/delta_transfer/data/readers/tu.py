"""The layout of the TU data sets: text files <NAME>_A, _graph_indicator, _graph_labels and, if there, _node_labels."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...common.console import shorten_list
from ...common.errors import UserError
from ...common.options import option
from ..dataset import Dataset
from ..files import read_lines
from ..options import DatasetConfig, Publication
from ..packed_graphs import GraphDataset, PackedGraphs, no_picture
from ..registry import reader

MOST_LABELS = 120  # rows of the networks' embedding of nodes


@dataclass
class TUConfig(DatasetConfig):
    """Graphs of K classes, which are tested by cross-validation."""

    task: ClassVar[str] = "graph_classification"

    title: str | None = option(None, "title of the data set in reports; null means its name", identity=False)
    prefix: str = option(help="what the names of the files begin with, such as PROTEINS")
    folds: int = option(10, "stratified folds, drawn with subset_seed", at_least=2)
    fold: int = option(0, "the fold that is tested on: 0 .. folds-1", at_least=0)

    def publication(self, of_reader: Publication) -> Publication:
        files = tuple(f"{self.prefix}_{name}.txt" for name in ("A", "graph_indicator", "graph_labels"))
        return Publication(self.title or self.name, files, of_reader.source)

    @property
    def as_published(self) -> bool:
        return (self.fold, self.folds) == (0, 10)  # `official` counts this fold

    def check(self) -> None:
        super().check()
        self.require(self.fold < self.folds, "fold", f"dataset.fold must be in 0..{self.folds - 1}, got {self.fold}.")


@reader(
    "tu",
    title="TU data set",
    options=TUConfig,
    source="the archive of https://chrsmrrs.github.io/datasets/",
)
def tu(root: Path, config: TUConfig) -> Dataset:
    """Reads graphs with their node labels, if there are any; edges have no features. One fold is the test split.

    Raises UserError for lines without integers, edges between graphs, and more node labels than the networks embed.
    """

    def column(name: str, width: int = 1) -> np.ndarray:
        return _integers(root / f"{config.prefix}_{name}.txt", width)

    graph, of_graph, edges = column("graph_indicator")[:, 0] - 1, column("graph_labels")[:, 0], column("A", 2) - 1
    count = len(of_graph)
    if len(graph) == 0 or (np.diff(graph) < 0).any() or graph[0] < 0 or graph[-1] >= count:
        raise UserError(f"{config.prefix}_graph_indicator.txt: nodes must be in the order of {count:,} graphs.")
    if empty := np.setdiff1d(np.arange(count), graph).tolist():
        raise UserError(f"{config.prefix}: graphs without a node: {shorten_list([str(n + 1) for n in empty])}.")
    labels = np.zeros(len(graph), dtype=np.int64)
    if (root / f"{config.prefix}_node_labels.txt").exists():
        labels = column("node_labels")[:, 0]
    values = np.unique(labels)
    if len(labels) != len(graph) or len(values) > MOST_LABELS:
        raise UserError(
            f"{config.prefix}_node_labels.txt has {len(labels):,} lines with {len(values)} labels for {len(graph):,} "
            f"nodes; the networks know {MOST_LABELS} labels."
        )
    inside = ((edges >= 0) & (edges < len(graph))).all()
    if not inside or (graph[edges[:, 0]] != graph[edges[:, 1]]).any():
        raise UserError(f"{config.prefix}_A.txt has edges between graphs, or to nodes that are not there.")

    edges = edges[(edges[:, 0] != edges[:, 1])]  # the networks add self-loops of their own
    edges = np.unique(np.concatenate([edges, edges[:, ::-1]]), axis=0)  # both ways, each once
    edges = edges[np.argsort(graph[edges[:, 0]], kind="stable")]
    node_counts = np.bincount(graph, minlength=count)
    edge_counts = np.bincount(graph[edges[:, 0]], minlength=count)
    starts = (np.cumsum(node_counts) - node_counts)[graph[edges[:, 0]]]
    nodes = np.stack([np.searchsorted(values, labels), np.zeros_like(labels)], axis=1)
    packed = PackedGraphs(
        nodes, (edges - starts[:, None]).T, np.zeros((len(edges), 2), dtype=np.int64), node_counts, edge_counts
    )
    classes = np.unique(of_graph)
    target = np.searchsorted(classes, of_graph).astype(np.int64)
    test = stratified_folds(target, config.folds, config.subset_seed) == config.fold
    digest = hashlib.sha256(config.name.encode())
    for array in (*vars(packed).values(), target):  # without the fold, since runs of all folds share the data set
        digest.update(np.ascontiguousarray(array).tobytes() + b"|")
    names = tuple(f"graph {number}" for number in range(1, count + 1))
    return GraphDataset(
        config.name, tuple(map(str, classes)), target, test, names, no_picture, digest.hexdigest(), graphs=packed
    )


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold (N,) of each graph. Each class is spread evenly in random order, and the next starts where it ended."""
    fold, position = np.empty(len(labels), dtype=np.int64), 0
    for label in np.unique(labels):
        members = np.random.default_rng((seed, 8, label)).permutation(np.flatnonzero(labels == label))
        fold[members] = (position + np.arange(len(members))) % folds
        position += len(members)
    return fold


def _integers(path: Path, width: int) -> np.ndarray:
    """(lines, width) int64 of comma-separated integers."""
    rows = [line.split(",") for line in read_lines(path)]
    try:
        values = np.array([[int(cell) for cell in row] for row in rows], dtype=np.int64)
    except (ValueError, OverflowError):
        values = np.empty((0, 0), dtype=np.int64)
    if values.shape != (len(rows), width):
        raise UserError(f"{path} must have {width} whole number{'s' * (width > 1)} in each line, divided by commas.")
    return values

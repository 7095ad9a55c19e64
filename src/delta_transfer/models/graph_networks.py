"""The graph networks of Hu et al. (Strategies for pre-training graph neural networks, ICLR 2020), in plain PyTorch.

Their published weight files load strictly: parameters have the same names and shapes. Source: paper and code
(snap-stanford/pretrain-gnns). In a layer j runs over the neighbours of node i and i itself, whose edge to itself has a
bond type of its own; x_j is a node's vector and e_ij the sum of the embeddings of the edge's type and direction.
"""

from functools import partial
from pathlib import PurePath

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.graphs import Graphs, chains
from .hooked import HookedNetwork

ATOMS, CHIRALITIES, BONDS, DIRECTIONS = 120, 3, 6, 3  # rows of the embeddings
SELF_LOOP = 4  # the bond type of a node's edge to itself
WIDTH, DEPTH = 300, 5


class Neighbours:
    """The edges of a batch, with an edge of each node to itself, sorted by the node i at which they end.

    Sums over j never hold a vector for each edge: x_j is added up where it is read, and of the few different vectors
    e_ij each is counted first.
    """

    def __init__(self, graphs: Graphs):
        nodes = len(graphs.nodes)
        itself = torch.arange(nodes, device=graphs.device).expand(2, -1)
        loop = graphs.edge_features.new_tensor([SELF_LOOP, 0]).expand(nodes, 2)
        edges, features = torch.cat([graphs.edges, itself], dim=1), torch.cat([graphs.edge_features, loop])
        order = edges[1].argsort(stable=True)
        self.there, self.here = edges[:, order]  # (E,) each: j and i
        self.kinds = features[order] + features.new_tensor([0, BONDS])  # (E, 2): rows of both embeddings' tables
        self.degrees = torch.bincount(self.here, minlength=nodes)  # (N,), with the self-loop
        self.starts = F.pad(self.degrees.cumsum(0), (1, 0))  # (N + 1,): where the edges of a node begin

    def sum(self, x: Tensor, table: Tensor, weights: Tensor | None = None) -> Tensor:
        """sum_j weight_ij (x_j + e_ij), (N, D), for x (N, D), a table (K, D) of rows e and weights (E,) or 1."""
        each = x.new_ones(len(self.here)) if weights is None else weights.to(x)
        summed = F.embedding_bag(
            self.there, x, self.starts, mode="sum", per_sample_weights=each, include_last_offset=True
        )
        places = (self.here[:, None] * len(table) + self.kinds).flatten()
        counted = _sum(each.repeat_interleave(2), places, len(x) * len(table)).view(len(x), len(table))
        return summed + counted @ table.to(x)


class GraphLayer(nn.Module):
    """x (N, D) and the neighbours of each node -> (N, D). A subclass defines how messages add up."""

    def __init__(self, width: int, edge_width: int | None = None):
        super().__init__()
        self.edge_embedding1 = _embedding(BONDS, edge_width or width)
        self.edge_embedding2 = _embedding(DIRECTIONS, edge_width or width)

    @property
    def edge_table(self) -> Tensor:
        """(BONDS + DIRECTIONS, D): e_ij is the sum of two of its rows."""
        return torch.cat([self.edge_embedding1.weight, self.edge_embedding2.weight])


class GCNLayer(GraphLayer):
    """sum_j (x_j W + b + e_ij) / sqrt(d_i d_j), with degrees d that count the self-loop."""

    def __init__(self, width: int):
        super().__init__(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, beside: Neighbours) -> Tensor:
        x = self.linear(x)
        scale = beside.degrees.to(x).rsqrt()
        return beside.sum(x, self.edge_table, scale[beside.here] * scale[beside.there])


class GINLayer(GraphLayer):
    """MLP(sum_j (x_j + e_ij)), MLP = Linear(D, 2D), ReLU, Linear(2D, D)."""

    def __init__(self, width: int):
        super().__init__(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, beside: Neighbours) -> Tensor:
        return self.mlp(beside.sum(x, self.edge_table))


class SAGELayer(GraphLayer):
    """The mean over j of x_j W + b + e_ij, divided by its Euclidean norm."""

    def __init__(self, width: int):
        super().__init__(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, beside: Neighbours) -> Tensor:
        return F.normalize(beside.sum(self.linear(x), self.edge_table) / beside.degrees[:, None])


class GATLayer(GraphLayer):
    """The mean over two heads of sum_j a_ij v_j, plus a bias; v_j = x_j W + b + e_ij, a_ij = softmax over j of
    LeakyReLU([x_i W + b, v_j] . att) with slope 0.2."""

    def __init__(self, width: int, heads: int = 2):
        super().__init__(width, heads * width)
        self.width, self.heads = width, heads
        self.weight_linear = nn.Linear(width, heads * width)
        self.att = nn.Parameter(torch.empty(1, heads, 2 * width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.att)

    def forward(self, x: Tensor, beside: Neighbours) -> Tensor:
        x = self.weight_linear(x).view(-1, self.heads, self.width)
        table = self.edge_table.view(-1, self.heads, self.width).to(x)
        of_here, of_there = self.att.to(x).split(self.width, dim=2)
        scores = (x * of_here).sum(dim=2)[beside.here] + (x * of_there).sum(dim=2)[beside.there]
        scores = scores + (table * of_there).sum(dim=2)[beside.kinds].sum(dim=1)
        scores = F.leaky_relu(scores, 0.2)  # (E, heads)
        index = beside.here[:, None].expand_as(scores)
        largest = scores.new_full((len(x), self.heads), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
        weights = (scores - largest[beside.here]).exp()
        weights = weights / _sum(weights, beside.here, len(x))[beside.here]
        heads = zip(x.unbind(1), table.unbind(1), weights.unbind(1), strict=True)
        return torch.stack([beside.sum(*(part.contiguous() for part in head)) for head in heads]).mean(0) + self.bias


LAYERS: dict[str, type[GraphLayer]] = {"gcn": GCNLayer, "gin": GINLayer, "sage": SAGELayer, "gat": GATLayer}


class GraphEncoder(nn.Module):
    """Graphs -> logits (B, num_classes): five layers with BatchNorm, the mean over a graph's nodes, a linear head.

    A ReLU follows each layer except the last, and dropout with probability `dropout` follows every layer.
    """

    def __init__(self, layer: type[GraphLayer], num_classes: int, width: int = WIDTH, depth: int = DEPTH):
        super().__init__()
        self.dropout = 0.0
        self.x_embedding1 = _embedding(ATOMS, width)
        self.x_embedding2 = _embedding(CHIRALITIES, width)
        self.gnns = nn.ModuleList(layer(width) for _ in range(depth))
        self.batch_norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        self.head = nn.Linear(width, num_classes)

    def forward(self, graphs: Graphs) -> Tensor:
        nodes, beside = graphs.nodes, Neighbours(graphs)
        x = self.x_embedding1(nodes[:, 0]) + self.x_embedding2(nodes[:, 1])
        for number, (layer, norm) in enumerate(zip(self.gnns, self.batch_norms, strict=True), 1):
            x = norm(layer(x, beside))
            if number < len(self.gnns):
                x = F.relu(x)
            if self.training and self.dropout:
                x = x * dropout_mask(x, self.dropout)
        pooled = _sum(x, graphs.graph, len(graphs)) / _count(graphs.graph, len(graphs), x)[:, None]
        return self.head(pooled)


GRAPH_NETWORKS = {name: partial(GraphEncoder, layer) for name, layer in LAYERS.items()}


def network_of_file(weights: str) -> str | None:
    """The network whose published weight files are named like this one; None for any other name.

    Layers of GCN and GraphSAGE have parameters of the same names and shapes, so that only file names tell them apart.
    """
    start = PurePath(weights).name.partition("_")[0]
    return {"gcn": "gcn", "graphsage": "sage", "gat": "gat"}.get(start)


class GraphNetwork(HookedNetwork):
    """A graph network with its tapped node maps (N, C, 1, 1), where N are the nodes of all graphs of a batch."""

    def __init__(self, model: nn.Module, head: str, taps: tuple[str, ...] | list[str] = ()):
        super().__init__(model, head, taps, "NC")

    def _with_model(self, model: nn.Module) -> "GraphNetwork":
        return GraphNetwork(model, self.head, self.taps)

    def map_shapes(self, batch: int, image_size: int, training: bool) -> dict[str, tuple[int, int, int]]:
        """(C, 1, 1) of each tapped map, whatever the arguments, since graphs have no common size."""
        return self.map_shapes_on(chains(2, 2, next(self.parameters()).device))


def _embedding(rows: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, width)
    nn.init.xavier_uniform_(embedding.weight)
    return embedding


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p). On many CPUs F.dropout takes three times as long to draw it."""
    return ((torch.rand(x.shape, device=x.device) >= p) / (1 - p)).to(x)


def _sum(values: Tensor, places: Tensor, count: int) -> Tensor:
    """(E, ...) -> (count, ...): the sum of the values of each place."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, places, values)


def _count(places: Tensor, count: int, like: Tensor) -> Tensor:
    """(count,): how often each place occurs, with the dtype of `like`."""
    return _sum(like.new_ones(len(places)), places, count)

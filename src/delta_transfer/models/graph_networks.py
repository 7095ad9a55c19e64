"""The graph networks of Hu et al. (Strategies for pre-training graph neural networks, ICLR 2020), in plain PyTorch.

Their published weight files load strictly: parameters have the same names and shapes. Source: paper and code
(snap-stanford/pretrain-gnns). In a layer j runs over the neighbours of node i and i itself, whose edge to itself has a
bond type of its own; x_j is a node's vector and e_ij the sum of the embeddings of the edge's type and direction.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.graphs import Graphs, chains
from .hooked import HookedNetwork

ATOMS, CHIRALITIES, BONDS, DIRECTIONS = 120, 3, 6, 3  # rows of the embeddings
SELF_LOOP = 4  # the bond type of a node's edge to itself
WIDTH, DEPTH = 300, 5


class GraphLayer(nn.Module):
    """x (N, D), edges (2, E) with self-loops, edge features (E, 2) -> (N, D). A subclass says how messages add up."""

    def __init__(self, width: int, edge_width: int | None = None):
        super().__init__()
        self.edge_embedding1 = _embedding(BONDS, edge_width or width)
        self.edge_embedding2 = _embedding(DIRECTIONS, edge_width or width)

    def edge_vectors(self, features: Tensor) -> Tensor:
        return self.edge_embedding1(features[:, 0]) + self.edge_embedding2(features[:, 1])


class GCNLayer(GraphLayer):
    """sum_j (x_j W + b + e_ij) / sqrt(d_i d_j), with degrees d that count the self-loop."""

    def __init__(self, width: int):
        super().__init__(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        x = self.linear(x)
        here, there = edges[1], edges[0]
        scale = _count(here, len(x), x).rsqrt()
        messages = (scale[here] * scale[there])[:, None] * (x[there] + self.edge_vectors(features))
        return _sum(messages, here, len(x))


class GINLayer(GraphLayer):
    """MLP(sum_j (x_j + e_ij)), MLP = Linear(D, 2D), ReLU, Linear(2D, D)."""

    def __init__(self, width: int):
        super().__init__(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        return self.mlp(_sum(x[edges[0]] + self.edge_vectors(features), edges[1], len(x)))


class SAGELayer(GraphLayer):
    """The mean over j of x_j W + b + e_ij, divided by its Euclidean norm."""

    def __init__(self, width: int):
        super().__init__(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        x = self.linear(x)
        summed = _sum(x[edges[0]] + self.edge_vectors(features), edges[1], len(x))
        return F.normalize(summed / _count(edges[1], len(x), summed)[:, None])


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

    def forward(self, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        count, here = len(x), edges[1]
        x = self.weight_linear(x).view(-1, self.heads, self.width)
        values = x[edges[0]] + self.edge_vectors(features).view(-1, self.heads, self.width)
        scores = F.leaky_relu((torch.cat([x[here], values], dim=2) * self.att).sum(dim=2), 0.2)  # (E, heads)
        index = here[:, None].expand_as(scores)
        largest = scores.new_full((count, self.heads), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
        weights = (scores - largest[here]).exp()
        weights = weights / _sum(weights, here, count)[here]
        return _sum(weights[..., None] * values, here, count).mean(dim=1) + self.bias


LAYERS: dict[str, type[GraphLayer]] = {"gcn": GCNLayer, "gin": GINLayer, "sage": SAGELayer, "gat": GATLayer}


class GraphEncoder(nn.Module):
    """Graphs -> logits (B, num_classes): five layers with BatchNorm, the mean over a graph's nodes, a linear head.

    After each layer but the last comes a ReLU, after each layer dropout with probability `dropout`.
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
        nodes, edges = graphs.nodes, graphs.edges
        itself = torch.arange(len(nodes), device=nodes.device).expand(2, -1)
        loop = graphs.edge_features.new_tensor([SELF_LOOP, 0]).expand(len(nodes), 2)
        edges, features = torch.cat([edges, itself], dim=1), torch.cat([graphs.edge_features, loop])
        x = self.x_embedding1(nodes[:, 0]) + self.x_embedding2(nodes[:, 1])
        for number, (layer, norm) in enumerate(zip(self.gnns, self.batch_norms, strict=True), 1):
            x = norm(layer(x, edges, features))
            if number < len(self.gnns):
                x = F.relu(x)
            x = F.dropout(x, self.dropout, self.training)
        pooled = _sum(x, graphs.graph, len(graphs)) / _count(graphs.graph, len(graphs), x)[:, None]
        return self.head(pooled)


GRAPH_NETWORKS = {name: partial(GraphEncoder, layer) for name, layer in LAYERS.items()}


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


def _sum(values: Tensor, places: Tensor, count: int) -> Tensor:
    """(E, ...) -> (count, ...): the sum of the values of each place."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, places, values)


def _count(places: Tensor, count: int, like: Tensor) -> Tensor:
    """(count,) how often each place occurs, as numbers like those of `like`."""
    return _sum(like.new_ones(len(places)), places, count)

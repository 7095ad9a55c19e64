"""DELTA on the nodes of a graph network (PyTorch Geometric).

    pip install '.[examples]' && python examples/graph.py

A GIN learns whether generated graphs are rings, then, with a new head, whether they are paths, rings or stars. The
tap is the second linear layer of its last block; maps are nodes x channels.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv, global_add_pool

from delta_transfer import DELTA, AttentionConfig, channel_attention, tapped


class GIN(nn.Module):
    def __init__(self, num_classes: int, width: int = 16):
        super().__init__()
        self.first = GINConv(nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width)))
        self.second = GINConv(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x, edge_index, graph):
        x = F.relu(self.first(x, edge_index))
        return self.head(global_add_pool(F.relu(self.second(x, edge_index)), graph))


def graph(kind: int, nodes: int) -> Data:
    """0: a path, 1: a ring, 2: a star."""
    first = torch.zeros(nodes - 1, dtype=torch.long) if kind == 2 else torch.arange(nodes - 1)
    edges = torch.stack([first, torch.arange(1, nodes)])
    if kind == 1:
        edges = torch.cat([edges, torch.tensor([[nodes - 1], [0]])], dim=1)
    return Data(x=torch.ones(nodes, 1), edge_index=torch.cat([edges, edges.flip(0)], dim=1), y=kind)


def batches_of(kinds: int, count: int) -> list[tuple]:
    """Pairs of the network's arguments (nodes, edges, graph of each node), and labels."""
    batches = []
    for _ in range(count):
        batch = Batch.from_data_list([graph(i % kinds, nodes=4 + i % 5) for i in torch.randperm(12).tolist()])
        batches.append(((batch.x, batch.edge_index, batch.batch), batch.y))
    return batches


def main(steps: int = 100) -> dict[str, float]:
    torch.manual_seed(0)
    model = GIN(num_classes=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for inputs, labels in batches_of(kinds=2, count=steps):
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()

    source = tapped(model, head="head", taps=["second.nn.2"], layout="NC").freeze()
    target = source.with_new_head(num_classes=3, seed=0).requires_grad_(True).train()
    train = batches_of(kinds=3, count=4)
    attention = channel_attention(source, train, num_classes=3, options=AttentionConfig(images=24, head_epochs=5))
    delta = DELTA(alpha=0.01)  # a sum over nodes; the published graph code has no factor C: its alpha is 16 times this
    delta.load_fitted(attention.importance)

    optimizer = torch.optim.Adam(target.parameters(), lr=0.01)
    for step in range(steps):
        inputs, labels = train[step % len(train)]
        outputs = target(*inputs)
        with torch.no_grad():
            source_outputs = source(*inputs)
        terms = {"cross_entropy": F.cross_entropy(outputs["logits"], labels)}
        terms |= delta.penalty(target, outputs, source_outputs)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    return {name: term.item() for name, term in terms.items()}


if __name__ == "__main__":
    print(main())

"""The logits of a network without one channel of a tapped map, at the least cost.

Three kinds of operations follow a tap, in this order:

1. `channelwise` operations (BatchNorm, ReLU, an addition): a removed channel changes only itself. One pass without
   *any* channel therefore gives the value that each channel has when it is removed alone.
2. `mixing` operations, the first convolutions (or the head) that read the result. They are linear: the output is the
   intact one plus the contribution of the one channel that changed.
3. The `rest` is computed for each removed channel, for many of them in one batch. It is empty where the head mixes.

Values that the rest reads and that do not depend on the tap (a residual branch) are kept from the intact pass.
"""

import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...models.frozen import traced_maps
from ...models.hooked import HookedNetwork
from ...models.taps import Network, call, forbid_inplace

CHANNELWISE_MODULES = {nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.AvgPool2d}
CHANNELWISE_FUNCTIONS = {operator.add, torch.add, F.relu, torch.relu}
# In-place operations, which would overwrite a kept value, and their replacements.
OUT_OF_PLACE: dict[Any, Any] = {
    **{operator.iadd: operator.add, operator.imul: operator.mul, torch.relu_: torch.relu, F.relu_: F.relu},
    **{"add_": "add", "mul_": "mul", "relu_": "relu"},
}

Kept = dict[fx.Node, Tensor]  # values of an intact pass


class Suffixes:
    """The parts of the frozen `network` behind its taps, in `taps` by the tap's name."""

    def __init__(self, network: Network):
        self.traced = traced_maps(network, with_logits=True)
        graph = self.traced.graph
        forbid_inplace(self.traced, graph, set(graph.nodes))  # kept values stay what they were
        for node in graph.nodes:
            if node.op in ("call_function", "call_method"):
                node.target = OUT_OF_PLACE.get(node.target, node.target)
        self.traced.recompile()
        output = next(node for node in graph.nodes if node.op == "output").args[0]
        self.logits = output["logits"]
        self.taps = {tap: Suffix(self.traced, output[tap], self.logits) for tap in network.taps}
        self.keep = {self.logits}.union(*(suffix.keep for suffix in self.taps.values()))

    def run_intact(self, images: Tensor) -> tuple[Tensor, Kept]:
        """Logits (B, K) and every value that the suffixes need."""
        kept: Kept = {}
        _Keeping(self.traced, self.keep, kept).run(images)
        return kept[self.logits], kept


class WholePasses:
    """The same interface for a network that is not traced: one whole pass for each removed channel."""

    def __init__(self, network: HookedNetwork):
        self.network = network
        self.taps = {tap: WholePass(network, tap) for tap in network.taps}

    def run_intact(self, inputs: Any) -> tuple[Tensor, Any]:
        outputs = call(self.network, inputs)
        return outputs["logits"], (inputs, outputs)


class WholePass:
    def __init__(self, network: HookedNetwork, tap: str):
        self.network, self.tap = network, tap

    def removals(self, kept: Any, forward_images: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(removed channel (1,), logits (1, B, K) without it), for all channels in order."""
        inputs, outputs = kept
        for channel in range(outputs[self.tap].shape[1]):
            yield torch.tensor([channel]), self.network.logits_without(self.tap, channel, inputs)[None]


def suffixes_of(network: Network) -> Suffixes | WholePasses:
    """What computes logits without a channel, at the least cost that the network allows."""
    return WholePasses(network) if isinstance(network, HookedNetwork) else Suffixes(network)


class Suffix:
    """The part of a network between a tap and the logits."""

    def __init__(self, traced: fx.GraphModule, tap: fx.Node, logits: fx.Node):
        self.traced, self.tap, self.logits = traced, tap, logits
        behind = _nodes_behind(traced.graph, tap, logits)
        self.channelwise = []
        unmixed = {tap}
        for node in behind:
            if self._is_channelwise(node) and unmixed.issuperset(set(node.all_input_nodes).intersection(behind)):
                self.channelwise.append(node)
                unmixed.add(node)
        self.mixing = [
            node for node in behind if node not in unmixed and self._is_linear(node) and _input(node) in unmixed
        ]
        rest = [node for node in behind if node not in unmixed and node not in self.mixing]
        # The values that the rest reads from outside, in a fixed order.
        self.inputs = list(dict.fromkeys(v for node in rest for v in node.all_input_nodes if v not in rest))
        self.rest = _part(traced, rest, self.inputs, logits) if rest else None
        self.unmixed = unmixed
        (images,) = (node for node in traced.graph.nodes if node.op == "placeholder")
        self.of_images = {images, *_nodes_behind(traced.graph, images, logits)}  # all that have a row for each image
        outside = {value for node in behind for value in node.all_input_nodes}.difference(behind)
        self.keep = (
            outside
            | {tap, *self.mixing}
            | unmixed.intersection(value for node in self.mixing + rest for value in node.all_input_nodes)
        )

    def removals(self, kept: Kept, forward_images: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(removed channels (k,), logits (k, B, K) without each of them), for all channels in order.

        At most `forward_images` images (each copy of the batch counted) go through the rest of the network at once;
        where there is no rest, 64 times as many rows of logits.
        """
        without = self._without_any(kept)
        images, channels = kept[self.tap].shape[:2]
        at_once = max(1, forward_images * (1 if self.rest else 64) // images)
        for removed in torch.arange(channels, device=kept[self.tap].device).split(at_once):
            values = {node: self._mixed(node, removed, kept, without) for node in self.mixing}
            if self.rest:
                for node in self.inputs:
                    if node in self.unmixed:
                        values[node] = _replaced(kept[node], without[node], removed)
                    elif node not in values:
                        values[node] = kept[node]
                        if node in self.of_images and isinstance(kept[node], Tensor):
                            values[node] = torch.cat([kept[node]] * len(removed))
                logits = self.rest(*(values[node] for node in self.inputs))
            else:
                logits = values[self.logits]
            yield removed, logits.view(len(removed), images, -1)

    def _without_any(self, kept: Kept) -> Kept:
        """The channelwise values with all channels of the tapped map at 0."""
        values = {self.tap: torch.zeros_like(kept[self.tap])}
        interpreter = fx.Interpreter(self.traced)
        for node in self.channelwise:
            interpreter.env = {value: values.get(value, kept.get(value)) for value in node.all_input_nodes}
            values[node] = interpreter.run_node(node)
        return values

    def _mixed(self, node: fx.Node, removed: Tensor, kept: Kept, without: Kept) -> Tensor:
        """Output (k * B, ...) of a convolution or linear layer: the intact one plus one channel's contribution."""
        module, intact, value = _module(self.traced, node), kept[node], _input(node)
        change = (without[value][:, removed] - kept[value][:, removed]).transpose(0, 1)  # (k, B, h, w) or (k, B)
        copies, images = change.shape[:2]
        if isinstance(module, nn.Linear):
            return (intact + change[:, :, None] * module.weight.T[removed, None, :]).flatten(0, 1)
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
        weight = module.weight[:, removed].flatten(2).movedim(0, -1)  # (k, kernel, out)
        columns = F.unfold(
            change.reshape(copies * images, 1, *change.shape[2:]),
            module.kernel_size,
            module.dilation,
            module.padding,
            module.stride,
        )  # (k * B, kernel, h' * w')
        columns = columns.unflatten(0, (copies, images)).transpose(2, 3).flatten(1, 2)  # (k, B * h' * w', kernel)
        intact_rows = intact.permute(0, 2, 3, 1).reshape(1, -1, intact.shape[1])
        mixed = torch.baddbmm(intact_rows.expand(copies, -1, -1), columns, weight)
        return mixed.view(copies * images, *intact.shape[2:], -1).permute(0, 3, 1, 2)

    def _is_channelwise(self, node: fx.Node) -> bool:
        """Whether a channel of its output depends on the same channel of its inputs alone, in evaluation mode."""
        if self._flattens(node):
            return self._pools(_input(node))
        if node.op == "call_method":
            return node.target == "relu"
        return node.target in CHANNELWISE_FUNCTIONS or self._type(node) in CHANNELWISE_MODULES or self._pools(node)

    def _pools(self, node: fx.Node) -> bool:
        """Whether it leaves one feature of each channel."""
        module = _module(self.traced, node)
        if type(module) is nn.AdaptiveAvgPool2d:
            return module.output_size in (1, (1, 1))
        size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
        return node.target is F.adaptive_avg_pool2d and size in (1, (1, 1))

    def _is_linear(self, node: fx.Node) -> bool:
        module = _module(self.traced, node)
        if type(module) is nn.Conv2d:
            return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if type(module) is not nn.Linear:
            return False
        value = _input(node)
        while self._type(value) in (nn.Dropout, nn.ReLU, nn.Identity):
            value = _input(value)
        return self._flattens(value)  # on a feature map it would work along the width

    def _flattens(self, node: fx.Node) -> bool:
        method = node.op == "call_method" and node.target == "flatten"
        return method or node.target is torch.flatten or self._type(node) is nn.Flatten

    def _type(self, node: fx.Node) -> type[nn.Module] | None:
        module = _module(self.traced, node)
        return None if module is None else type(module)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _input(node: fx.Node) -> fx.Node:
    """The value that a node works on."""
    return cast(fx.Node, node.args[0])


def _nodes_behind(graph: fx.Graph, start: fx.Node, end: fx.Node) -> dict[fx.Node, None]:
    """Nodes that depend on `start` and that `end` depends on, in execution order, as an ordered set."""
    needed = {end}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    reached = {start}
    for node in graph.nodes:
        if node.op != "output" and any(value in reached for value in node.all_input_nodes):
            reached.add(node)
    return {node: None for node in graph.nodes if node in reached and node in needed and node is not start}


def _part(traced: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], result: fx.Node) -> fx.GraphModule:
    """`nodes` as a network of its own: values of `inputs` -> value of `result`."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[result])
    return fx.GraphModule(traced, graph)


def _replaced(intact: Tensor, without: Tensor, removed: Tensor) -> Tensor:
    """A copy of (B, C, ...) for each of `removed`, with that channel from `without`: (k * B, C, ...)."""
    copies = len(removed)
    replaced = torch.cat([intact] * copies)
    places = torch.arange(copies, device=removed.device)
    replaced.view(copies, *intact.shape)[places, :, removed] = without[:, removed].transpose(0, 1)
    return replaced


class _Keeping(fx.Interpreter):
    """Runs a traced network and keeps the values of some nodes. It frees all others as soon as they are used."""

    def __init__(self, traced: fx.GraphModule, keep: set[fx.Node], kept: Kept):
        super().__init__(traced)
        self.keep, self.kept = keep, kept

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if node in self.keep:
            self.kept[node] = value
        return value

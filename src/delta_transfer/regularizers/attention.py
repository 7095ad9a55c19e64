"""DELTA's supervised channel attention: how much the loss rises when a channel is removed.

1. `train_probe`: a new head on the frozen source network (L2-FE), BatchNorm in evaluation mode.
2. `channel_importance`: for every tapped channel, cross-entropy without it minus cross-entropy with it. Only what lies
   behind the tap is computed again, for many removed channels in one batch.
3. `attention_weights`: standardised per layer, softmax with a temperature.

Source: official DELTA code. It removes a channel by setting its filter to 0; at a tap that is a convolution without
bias this is the same as setting the channel of the tapped map to 0, which is what is done here, so that taps which are
not convolutions (Inception's blocks) have a meaning too.
"""

import operator
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..config import AttentionConfig
from ..environment import seconds_of
from ..models.taps import Network, forbid_inplace
from .base import Batches


def train_probe(source: Network, batches: Batches, num_classes: int, options: AttentionConfig) -> Network:
    """`source` with a new head for `num_classes`, trained on `batches`; everything else stays as it is.

    SGD, momentum 0.9; the learning rate falls exponentially, to a tenth after 6 epochs (official code).
    """
    probe = source.with_new_head(num_classes, options.seed).freeze()
    parameters = list(probe.head_parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(parameters, lr=options.head_lr, momentum=0.9, weight_decay=options.head_weight_decay)
    for epoch in range(options.head_epochs):
        optimizer.param_groups[0]["lr"] = options.head_lr * 0.1 ** (epoch / 6)
        for images, labels in batches:
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(probe(images)["logits"], labels).backward()
            optimizer.step()
    return probe.freeze()


@torch.no_grad()
def channel_importance(probe: Network, batches: Batches, images: int, forward_images: int) -> dict[str, Tensor]:
    """Rise of each image's cross-entropy when one channel of a tapped map is set to 0, {tap: (images, C_l) fp64}.

    The mean over images is the channel's importance. It takes the first `images` images of `batches` (further passes if
    one is too short). `forward_images` bounds how many images go through the network at once, counting each removed
    channel's copy; it changes no result.
    """
    suffixes = Suffixes(probe)
    rises: dict[str, list[Tensor]] = {tap: [] for tap in probe.taps}
    remaining = images
    for inputs, labels in _endlessly(batches):
        inputs, labels = inputs[:remaining], labels[:remaining]
        # In parts, so that the intact pass too stays within `forward_images`.
        for part, part_labels in zip(inputs.split(forward_images), labels.split(forward_images), strict=True):
            for tap, rise in _rises_on(suffixes, part, part_labels, forward_images).items():
                rises[tap].append(rise)
        remaining -= len(inputs)
        if remaining == 0:
            break
    return {tap: torch.cat(parts) for tap, parts in rises.items()}


def taylor_importance(probe: Network, batches: Batches, images: int) -> dict[str, Tensor]:
    """First-order estimate of the same, -sum_{h,w} a * dCE/da of each channel, {tap: (images, C_l)}; one backward pass.

    a is the tapped map; removing a channel changes it by -a (Molchanov et al., ICLR 2017).
    """
    estimates: dict[str, list[Tensor]] = {tap: [] for tap in probe.taps}
    remaining = images
    for inputs, labels in _endlessly(batches):
        inputs, labels = inputs[:remaining].detach().requires_grad_(True), labels[:remaining]
        outputs = probe(inputs)
        maps = [outputs[tap] for tap in probe.taps]
        gradients = torch.autograd.grad(F.cross_entropy(outputs["logits"], labels, reduction="sum"), maps)
        for tap, feature_map, gradient in zip(probe.taps, maps, gradients, strict=True):
            estimates[tap].append(-(feature_map.detach() * gradient).sum(dim=(2, 3)))
        remaining -= len(inputs)
        if remaining == 0:
            break
    return {tap: torch.cat(parts) for tap, parts in estimates.items()}


def split_half_correlation(rises: Tensor) -> float | None:
    """Spearman's rank correlation between a layer's importances on the even and on the odd images; rises (images, C).

    Near 1: the images were enough to rank the channels. Near 0: another draw of images would give another ranking.
    None where it has no meaning: one image, one channel, or no channel that matters more than another.
    """
    from scipy.stats import spearmanr  # slow to import

    if min(rises.shape) < 2:
        return None
    even, odd = (half.double().mean(dim=0).cpu().numpy() for half in (rises[::2], rises[1::2]))
    if even.min() == even.max() or odd.min() == odd.max():
        return None
    return float(spearmanr(even, odd).statistic)


@torch.no_grad()
def removal_cost(source: Network, images: Tensor) -> tuple[dict[str, int], float, float]:
    """Channels of each tap, and the measured seconds, per image, of a forward pass and of removing every channel."""
    suffixes = Suffixes(source)
    forward = seconds_of(lambda: suffixes.run_intact(images), images.device)
    _, kept = suffixes.run_intact(images)
    removal, channels = 0.0, {}
    for tap, node in suffixes.taps.items():
        channels[tap] = kept[node].shape[1]
        behind = seconds_of(partial(suffixes.run_behind, tap, kept[node], kept, 1, suffixes.logits), images.device)
        removal += behind * (1 if tap in suffixes.channelwise else channels[tap])
    return channels, forward / len(images), removal / len(images)


def attention_weights(importance: Tensor, temperature: float) -> Tensor:
    """w = softmax((v - mean v) / (T * std v)) of one layer, (C,) -> (C,), with the population standard deviation.

    Uniform where all channels matter the same.
    """
    spread = importance.std(correction=0)
    if spread == 0:
        return torch.full_like(importance, 1 / len(importance))
    return torch.softmax((importance - importance.mean()) / spread / temperature, dim=0)


def _endlessly(batches: Batches) -> Batches:
    """One pass after the other. Raises ValueError if a pass is empty, as a generator's second one is."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("A pass over the batches was empty: give a DataLoader or a list, not a generator.")


def _rises_on(suffixes: "Suffixes", images: Tensor, labels: Tensor, forward_images: int) -> dict[str, Tensor]:
    """Rises on one batch, {tap: (B, C_l) fp64}."""
    logits, kept = suffixes.run_intact(images)
    intact = F.cross_entropy(logits.double(), labels, reduction="none")
    rises = {}
    for tap in suffixes.taps:
        removals = suffixes.at_head_cost if tap in suffixes.channelwise else suffixes.one_by_one
        losses = [
            F.cross_entropy(logits.double(), labels.repeat(copies), reduction="none").view(copies, -1)
            for copies, logits in removals(tap, kept, forward_images)
        ]
        rises[tap] = torch.cat(losses).T - intact[:, None]
    return rises


# In evaluation mode none of these carries anything from one channel of a feature map to another.
CHANNELWISE_MODULES = {nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Dropout, nn.Identity}
CHANNELWISE_FUNCTIONS = {operator.add, operator.iadd, torch.add, torch.flatten, "flatten"}


class Suffixes:
    """For each tap, the part of the network between it and the logits, run on its own.

    The traced graph says which operations depend on the tap. Values that they also need but that do not depend on it
    (a residual branch) are kept from the intact pass.
    """

    def __init__(self, network: Network):
        self.traced = network.copy().eval().traced
        forbid_inplace(self.traced, self.traced.graph, set(self.traced.graph.nodes))  # kept values stay what they were
        self.traced.recompile()
        output = next(node for node in self.traced.graph.nodes if node.op == "output").args[0]
        self.logits = output["logits"]
        self.taps = {tap: output[tap] for tap in network.taps}
        self.behind = {tap: self._nodes_behind(node) for tap, node in self.taps.items()}
        self.channelwise = {tap for tap, nodes in self.behind.items() if self._is_channelwise(nodes)}
        # What an intact pass has to keep: the taps and the other inputs of what lies behind them.
        self.keep = {*self.taps.values(), self.logits, *self.logits.all_input_nodes}
        for tap, nodes in self.behind.items():
            inner = {self.taps[tap], *nodes}
            self.keep |= {value for node in nodes for value in node.all_input_nodes if value not in inner}

    def one_by_one(self, tap: str, kept: dict[fx.Node, Tensor], forward_images: int) -> Iterator[tuple[int, Tensor]]:
        """(copies, logits (copies * B, K)), a copy of the batch for each removed channel, for all channels in order."""
        feature_map = kept[self.taps[tap]]
        images, channels = feature_map.shape[:2]
        at_once = max(1, forward_images // images)
        for removed in torch.arange(channels, device=feature_map.device).split(at_once):
            copies = len(removed)
            ablated = torch.cat([feature_map] * copies)
            ablated.view(copies, *feature_map.shape)[torch.arange(copies), :, removed] = 0
            yield copies, self.run_behind(tap, ablated, kept, copies, self.logits)

    def at_head_cost(self, tap: str, kept: dict[fx.Node, Tensor], forward_images: int) -> Iterator[tuple[int, Tensor]]:
        """The same where no channel reaches another before the head: one pass without any of them tells all.

        Removing channel c changes feature c alone, f_c to g_c, and the logits by (g_c - f_c) times column c of the
        head's weight.
        """
        (features,) = self.logits.all_input_nodes
        weight = self.traced.get_submodule(self.logits.target).weight
        without = self.run_behind(tap, torch.zeros_like(kept[self.taps[tap]]), kept, 1, features)
        change = without - kept[features]  # (B, C)
        for removed in torch.arange(change.shape[1], device=change.device).split(max(1, forward_images)):
            logits = kept[self.logits] + change.T[removed, :, None] * weight.T[removed, None, :]
            yield len(removed), logits.flatten(0, 1)

    def run_intact(self, images: Tensor) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        """Logits (B, K) and every kept value."""
        kept: dict[fx.Node, Tensor] = {}
        interpreter = _Keeping(self.traced, self.keep, kept)
        interpreter.run(images)
        return kept[self.logits], kept

    def run_behind(
        self, tap: str, feature_map: Tensor, kept: dict[fx.Node, Tensor], copies: int, result: fx.Node
    ) -> Tensor:
        """The value of node `result` for `feature_map` (copies * B, C, h, w) in place of the tapped one."""
        nodes = self.behind[tap]
        interpreter = fx.Interpreter(self.traced)
        interpreter.env = {self.taps[tap]: feature_map}
        last_use = {value: node for node in nodes for value in node.all_input_nodes}
        for node in nodes:
            for value in node.all_input_nodes:
                if value not in interpreter.env:
                    interpreter.env[value] = _repeat(kept[value], copies)
            interpreter.env[node] = interpreter.run_node(node)
            if node is result:
                return interpreter.env[node]
            for value in node.all_input_nodes:
                if last_use[value] is node:
                    interpreter.env.pop(value, None)
        raise ValueError(f"{result} does not lie behind {tap}.")

    def _is_channelwise(self, nodes: list[fx.Node]) -> bool:
        """Whether `nodes`, from a tap to the logits, are a linear head on operations that work channel by channel."""
        *before, head = nodes
        return (
            head.op == "call_module"
            and type(self.traced.get_submodule(head.target)) is nn.Linear
            and all(
                _is_channelwise(self.traced.get_submodule(node.target))
                if node.op == "call_module"
                else node.target in CHANNELWISE_FUNCTIONS
                for node in before
            )
        )

    def _nodes_behind(self, start: fx.Node) -> list[fx.Node]:
        """Nodes that depend on `start` and that the logits depend on, in execution order."""
        needed = {self.logits}
        for node in reversed(self.traced.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        reached = {start}
        for node in self.traced.graph.nodes:
            if node.op != "output" and any(value in reached for value in node.all_input_nodes):
                reached.add(node)
        return [node for node in self.traced.graph.nodes if node in reached and node in needed and node is not start]


class _Keeping(fx.Interpreter):
    """Runs a traced network, keeps the values of some nodes and lets go of all others as soon as they are used."""

    def __init__(self, traced: fx.GraphModule, keep: set[fx.Node], kept: dict[fx.Node, Tensor]):
        super().__init__(traced)
        self.keep, self.kept = keep, kept

    def run_node(self, node: fx.Node):
        value = super().run_node(node)
        if node in self.keep:
            self.kept[node] = value
        return value


def _is_channelwise(module: nn.Module) -> bool:
    if type(module) is nn.AdaptiveAvgPool2d:  # to one feature for each channel
        return module.output_size in (1, (1, 1))
    return type(module) in CHANNELWISE_MODULES


def _repeat(value, copies: int):
    """A value of the intact pass for `copies` copies of its batch; numbers and sizes are the same for all."""
    return torch.cat([value] * copies) if isinstance(value, Tensor) else value

"""How far each parameter lies from the head, for a learning rate that falls towards the first layers."""

from collections import Counter
from collections.abc import Callable, Iterator

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def depths_below_head(model: nn.Module, is_head: Callable[[str], bool]) -> dict[str, int]:
    """D - d of each parameter but the head's, by name, where d is its depth and D is the depth of the head.

    Parameters are taken in the order in which the network declares them. Each block has a depth of its own. All layers
    before the first block are the stem, depth 0. Layers between two blocks, such as the convolution that halves a map,
    belong to the block behind them. Layers behind the last block, such as a final norm, have the head's depth.

    A block is a module with two matrices or more (weights of convolutions and linear layers). A mere container and a
    stage are replaced by their children. A stage is a module with two or more children of one class that are blocks and
    whose names differ only in a number. In a network without blocks, such as VGG, each layer is a block. So a ViT has
    the depths of BEiT's code and of timm's `layer_decay`; a ResNet or ConvNeXt has one for each residual block.
    """
    units = [kept for names in _units(model) if (kept := [name for name in names if not is_head(name)])]
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    counts = [len(matrices.intersection(names)) for names in units]
    least = 2 if max(counts, default=0) >= 2 else 1
    depths: dict[str, int] = {}
    depth = 0
    waiting: list[str] = []  # parameters before the block that they belong to
    for names, count in zip(units, counts, strict=True):
        if count >= least:
            depths |= dict.fromkeys(waiting, depth + (depth > 0))  # before the first block they are the stem
            waiting = []
            depth += 1
            depths |= dict.fromkeys(names, depth)
        else:
            waiting += names
    depths |= dict.fromkeys(waiting, depth + 1)
    return {name: depth + 1 - own for name, own in depths.items()}


def _units(module: nn.Module, prefix: str = "") -> Iterator[list[str]]:
    """The names of the parameters of each layer or block below `module`, in order."""
    for name, _ in module.named_parameters(prefix, recurse=False):
        yield [name]
    for child_name, child in module.named_children():
        place = f"{prefix}.{child_name}" if prefix else child_name
        if type(child) in CONTAINERS or _is_stage(child):
            yield from _units(child, place)
        elif names := [name for name, _ in child.named_parameters(place)]:
            yield names


def _is_stage(module: nn.Module) -> bool:
    for holder in (module, *(child for child in module.children() if type(child) in CONTAINERS)):
        blocks = (
            (type(child), name.rstrip("0123456789"))
            for name, child in holder.named_children()
            if name[-1:].isdigit() and sum(parameter.dim() >= 2 for parameter in child.parameters()) >= 2
        )
        if any(count > 1 for count in Counter(blocks).values()):
            return True
    return False

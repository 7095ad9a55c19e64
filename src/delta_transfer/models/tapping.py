"""Finds the modules of a network that can be tapped, and its default taps, by a pass that computes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.errors import UserError

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
SMALLEST_REDUCTION = 4  # maps of half the image's size belong to the stem of a pyramid
SHORTCUTS = ("downsample", "shortcut")


@dataclass(frozen=True)
class Tappable:
    """A module whose output can be tapped."""

    name: str
    kind: str  # its class
    shape: tuple[int, ...]  # of its output, without the batch


def run_once(model: nn.Module, image_size: int) -> list[Tappable]:
    """The modules of `model` that run once per pass and return a tensor, in the order in which they end.

    Nothing is computed for a model on the device meta. Raises UserError if an image of this size cannot pass.
    """
    seen: dict[str, Tappable] = {}
    again: set[str] = set()
    handles = []

    def note(name: str, output: Any) -> None:
        value = output[0] if isinstance(output, tuple | list) and output else output
        if name in seen:
            again.add(name)
        elif isinstance(value, Tensor):
            seen[name] = Tappable(name, type(model.get_submodule(name)).__name__, tuple(value.shape[1:]))

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(lambda m, i, output, name=name: note(name, output)))
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.empty(2, 3, image_size, image_size, device=device))
    except Exception as error:  # the model's own code can raise anything
        raise UserError(
            f"{type(model).__name__} does not take images of 3 colours and {image_size} x {image_size} pixels "
            f"(backbone.image_size): {type(error).__name__}."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return [entry for name, entry in seen.items() if name not in again]


def layout_of(shapes: Sequence[tuple[int, ...]]) -> str | None:
    """The layout of maps of these shapes (without the batch), one of layouts.LAYOUTS; None for no or mixed maps."""
    ranks = {len(shape) for shape in shapes}
    if ranks == {2}:
        return "BNC"
    if ranks != {3}:
        return None
    last = [shape[0] == shape[1] != shape[2] for shape in shapes]
    first = [shape[1] == shape[2] for shape in shapes]
    return "BCHW" if all(first) else "BHWC" if all(last) else None


def find_head(model: nn.Module, ran: Sequence[Tappable]) -> str:
    """The name of the layer of the logits, the last one with parameters. Raises UserError if it is not linear."""
    layers = [entry.name for entry in ran if list(model.get_submodule(entry.name).parameters(recurse=False))]
    if not layers or not isinstance(model.get_submodule(layers[-1]), nn.Linear):
        kind = type(model.get_submodule(layers[-1])).__name__ if layers else "none"
        raise UserError(f"The head of {type(model).__name__} is not a linear layer, but {kind}: it cannot be replaced.")
    return layers[-1]


def chain_of(model: nn.Module, ran: Sequence[Tappable]) -> list[str]:
    """The stages of a model in order: its children, or the children of the one that has most of the parameters."""
    ended = [entry.name for entry in ran if len(entry.shape) in (2, 3)]
    ended = [name for name in ended if not isinstance(model.get_submodule(name), NORMS)]
    size = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}
    names = [name for name, _ in model.named_children() if name in ended and size[name]]
    total = sum(size[name] for name in names)
    while True:
        large = [name for name in names if 2 * size[name] > total]
        inside = [f"{name}.{child}" for name in large for child, _ in model.get_submodule(name).named_children()]
        if not large or len([name for name in inside if name in ended]) < 2:
            return sorted((name for name in names if name in ended), key=ended.index)
        place = names.index(large[0])
        names[place : place + 1] = [name for name in inside if size[name]]


def choose_taps(model: nn.Module, ran: Sequence[Tappable], stages: Sequence[str], image_size: int) -> list[str]:
    """The default taps among `stages`, the modules that run one after the other.

    A pyramid has a tap in one stage per reduction from 4 on: the last convolution before normalisation, as published
    for ResNets, or the stage's output. A network of one size has taps at the quarters of its depth.
    """
    shapes = {entry.name: entry.shape for entry in ran}
    maps = [name for name in stages if len(shapes.get(name, ())) in (2, 3)]
    rank3 = [name for name in maps if len(shapes[name]) == 2]
    if 2 * len(rank3) > len(maps):
        usual = shapes[rank3[-1]]
        maps = [
            name for name in rank3 if shapes[name] == usual and any(True for _ in model.get_submodule(name).children())
        ]
    else:
        sides = {name: shapes[name][1] for name in maps}  # of (C, H, W) and of (H, W, C)
        maps = [name for name in maps if sides[name] > 1 and image_size // sides[name] >= SMALLEST_REDUCTION]
        if len(by_side := {sides[name]: name for name in maps}) > 1:
            return [last_convolution(model, ran, name) for name in by_side.values()]
    quarters = sorted({max(0, round(len(maps) * k / 4) - 1) for k in (1, 2, 3, 4)})
    return [maps[index] for index in quarters] if maps else []


def last_convolution(model: nn.Module, ran: Sequence[Tappable], stage: str) -> str:
    """The last convolution of a stage whose output has the stage's shape, if normalisation follows; else the stage."""
    shape = next(entry.shape for entry in ran if entry.name == stage)
    normalised = tuple(name + "." for name, module in model.named_modules() if isinstance(module, NORMS))
    inside = [
        (entry.name, module)
        for entry in ran
        if entry.name.startswith(stage + ".") and not any(word in entry.name for word in SHORTCUTS)
        for module in [model.get_submodule(entry.name)]
        if not entry.name.startswith(normalised) and list(module.parameters(recurse=False))
    ]
    shapes = {entry.name: entry.shape for entry in ran}
    for place in reversed(range(len(inside))):
        name, module = inside[place]
        if isinstance(module, nn.Conv2d | nn.Linear) and sorted(shapes[name]) == sorted(shape):
            behind = inside[place + 1][1] if place + 1 < len(inside) else None
            return name if isinstance(module, nn.Conv2d) and isinstance(behind, NORMS) else stage
    return stage

"""The frozen source network as training needs it: its tapped feature maps, at the least cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..data.loader import images_at_once
from .hooked import HookedNetwork
from .taps import Network, call


def frozen_maps(source: Network, with_logits: bool = False, precision: str = "fp32") -> nn.Module:
    """A network images (B, 3, H, W) -> {tap: (B, C, h, w)}: the maps of `source` in evaluation mode, up to rounding.

    It is a copy, so that `source` stays as it is. BatchNorm is folded into the convolution before it, except behind a
    tap, whose map is wanted before BatchNorm. Nothing behind the last tap is computed, unless `with_logits`. For
    precision="bf16" the convolutions' weights are cast once, since autocast would do it in every step. A HookedNetwork
    is copied as it is.
    """
    return source.copy().freeze() if isinstance(source, HookedNetwork) else traced_maps(source, with_logits, precision)


def traced_maps(source: Network, with_logits: bool = False, precision: str = "fp32") -> fx.GraphModule:
    """`frozen_maps` of a traced network."""
    # torchvision's tracer keeps blocks of convolution, BatchNorm and activation whole: this looks into them.
    traced = fx.symbolic_trace(source.copy().freeze().traced)
    graph = traced.graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    if not with_logits:
        output.args = ({name: node for name, node in output.args[0].items() if name in source.taps},)
        graph.eliminate_dead_code()
    for node in list(graph.nodes):
        convolution = node.args[0] if node.op == "call_module" else None
        # A map with another reader, such as the output that returns a tap, must not change.
        if isinstance(convolution, fx.Node) and convolution.op == "call_module" and len(convolution.users) == 1:
            place = str(convolution.target)
            layer, batchnorm = traced.get_submodule(place), traced.get_submodule(str(node.target))
            if type(layer) is nn.Conv2d and type(batchnorm) is nn.BatchNorm2d:
                traced.set_submodule(place, fuse_conv_bn_eval(layer, batchnorm))
                node.replace_all_uses_with(convolution)
                graph.erase_node(node)
    traced.recompile()
    traced.delete_all_unused_submodules()
    if precision == "bf16":
        for module in traced.modules():
            if isinstance(module, nn.Conv2d):
                module.bfloat16()
    traced.maps_alone = not with_logits  # type: ignore[assignment]
    return traced.eval().requires_grad_(False)


def frozen_backbone(network: Network, precision: str = "fp32") -> nn.Module:
    """`network` in evaluation mode, up to rounding, at the least cost for training its head alone.

    The head is the network's own; everything else is a frozen copy. A HookedNetwork is returned itself.
    """
    if isinstance(network, HookedNetwork):
        return network
    frozen = frozen_maps(network, with_logits=True, precision=precision)
    inside = frozen.traced if isinstance(frozen, HookedNetwork) else frozen
    inside.set_submodule(network.head, network.traced.get_submodule(network.head))
    return frozen


class FrozenSources(nn.Module):
    """Several frozen networks as one: images (B, 3, H, W) -> {name/tap: (B, C, h, w), name/logits: (B, K)}.

    Args:
        frozen: frozen_maps of each, by name.
        normalised: by name, the mean and standard deviation (3 values each) of its training images.
        images_normalised: mean and standard deviation of the `images` that come in.
    """

    def __init__(
        self,
        frozen: Mapping[str, nn.Module],
        normalised: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        images_normalised: tuple[Sequence[float], Sequence[float]],
    ):
        super().__init__()
        self.frozen = nn.ModuleDict(frozen)
        self.renormalised = [name for name in frozen if normalised[name] != images_normalised]
        for name in self.renormalised:
            # For pixels p in 0..1, x = (p - m) / s comes in, and (p - m') / s' = x * s / s' + (m - m') / s' is needed.
            (mean, std), (own_mean, own_std) = _columns(images_normalised), _columns(normalised[name])
            self.register_buffer(f"scale_{name}", (std / own_std).float())
            self.register_buffer(f"shift_{name}", ((mean - own_mean) / own_std).float())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        for name, network in self.frozen.items():
            x = images
            if name in self.renormalised:
                x = x * getattr(self, f"scale_{name}") + getattr(self, f"shift_{name}")
            outputs |= {f"{name}/{key}": value for key, value in network(x).items()}
        return outputs


def _columns(normalisation: tuple[Sequence[float], Sequence[float]]) -> list[Tensor]:
    """(3, 1, 1) each, in double precision."""
    return [torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in normalisation]


def forward_in_chunks(frozen: nn.Module, images: Any) -> dict[str, Tensor]:
    """The outputs of a network in evaluation mode, computed for as many images at a time as suit the device.

    A HookedNetwork computes all at once, since its inputs may not be divisible.
    """
    if isinstance(frozen, HookedNetwork):
        return call(frozen, images)
    # Chunks of another size change the last bits of logits, on which heads are trained, but not of maps on the letters.
    size = images.shape[2:] if getattr(frozen, "maps_alone", False) else ()
    at_once = images_at_once(images.device, size)
    chunks: list[dict[str, Tensor]] = [frozen(chunk) for chunk in images.split(at_once)]
    if len(chunks) == 1:
        return chunks[0]
    return {name: torch.cat([chunk.pop(name) for chunk in chunks]) for name in list(chunks[0])}

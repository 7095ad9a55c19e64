"""LoRA: trains a change of low rank of each weight matrix (Hu et al., ICLR 2022)."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.options import option
from ..models import Network
from .base import (
    METHODS,
    NO_SHAPES,
    Batch,
    MapShapes,
    Needs,
    Outputs,
    SourceShapes,
    TrainState,
    WithoutPenalty,
    module_name,
)


@METHODS.register("lora", "LoRA")
class LoRA(WithoutPenalty):
    """Loss = CE; W = W0 + scale/rank * B A for the backbone's linear layers. Its other parameters are frozen.

    W0 (m, n) is the source's weight, A (r, n) and B (m, r) are trained with the head. A convolution's kernel counts as
    a matrix with a row for each output channel. B begins with 0, A with PyTorch's initialisation of a linear layer.
    Weights with no more rows or columns than the rank are frozen.

    Source: the paper, and Microsoft's code (microsoft/LoRA at c18b175) for rank 8 and scale 16
    (examples/NLU/roberta_base_mnli.sh). Deviations: the paper changes two matrices of each attention. Here all linear
    layers change, as is usual for ViTs. That code gives a k x k convolution a change of rank r k, of a matrix with a
    row for each output channel and line of the kernel. Here its rank is r, as that of every other weight.

    The target's weights are W at any time. It is measured, exported and averaged as a plain network, and penalties on
    weights or features can be added (reg=sum). The gradients of A and B follow from that of W by the chain rule,
    dB = s dW A^T and dA = s B^T dW with s = scale/rank. This saves the optimizer's memory, but not that of dW.
    BatchNorm normalises by the batch and moves its statistics, as in fine-tuning. A and B have the head's learning
    rate.

    Call `setup(target)` before training, and `merge()` after each step of an optimizer over `parameters()`. `setup`
    raises UserError if the backbone has no such weights.
    """

    weight_decay: float = option(0.0, "weight decay of the optimizer, on A, B and the head", at_least=0)
    rank: int = option(8, "rank of the change of each weight matrix", above=0)
    scale: float = option(16.0, "the change is scale / rank * B A", above=0)
    layers: str = option(
        "auto",
        "layers that change: linear; all, convolutions too; or auto, linear ones, or convolutions where none is linear",
        choices=("auto", "linear", "all"),
    )

    needs = Needs(own_steps=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        self.weights: dict[str, nn.Parameter] = {}  # W of the target, by the name of its A and B
        self.starting_point: dict[str, Tensor] = {}  # W0

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        if processes > 1:
            raise UserError("reg=lora runs in one process: the gradient of W is not averaged over several.")
        if not self._changed(model, dict(model.named_parameters())):
            raise UserError(
                f"reg=lora would do nothing: with reg.layers={self.layers} this network has no layer of more than "
                f"reg.rank={self.rank} inputs and outputs."
            )

    def _changed(self, model: nn.Module, backbone: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The weights of `backbone` that get an A and a B, by name."""
        found: dict[type, dict[str, nn.Parameter]] = {nn.Linear: {}, nn.Conv2d: {}}
        for place, layer in model.named_modules():
            name = f"{place}.in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else f"{place}.weight"
            kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
            changes = isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention) and name in backbone
            if changes and min(backbone[name].flatten(1).shape) > self.rank:
                found[kind][name] = backbone[name]
        if self.layers == "all":
            return found[nn.Linear] | found[nn.Conv2d]
        return found[nn.Linear] or (found[nn.Conv2d] if self.layers == "auto" else {})

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        backbone = target.backbone_parameters()
        changed = self._changed(target.model, backbone)
        if not changed:
            raise UserError(f"reg=lora would train the head alone: the backbone has no weights for {self.layers}.")
        for parameter in backbone.values():
            parameter.requires_grad_(False)
        for name, weight in changed.items():
            key, (rows, columns) = module_name(name), weight.flatten(1).shape
            a = torch.empty(self.rank, columns).to(weight)
            self.a[key] = nn.Parameter(nn.init.kaiming_uniform_(a, a=math.sqrt(5)))
            self.b[key] = nn.Parameter(torch.zeros(rows, self.rank).to(weight))
            self.weights[key], self.starting_point[key] = weight, weight.detach().clone()
            weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(self._pass_on, key))

    def trained_in_backbone(self, target: Network) -> dict[str, nn.Parameter]:
        return {}

    @torch.no_grad()
    def _pass_on(self, key: str, weight: Tensor) -> None:
        """The gradient of W becomes those of A and B."""
        assert weight.grad is not None
        gradient, weight.grad = self.scale / self.rank * weight.grad.flatten(1), None
        a, b = self.a[key], self.b[key]
        for parameter, own in ((a, b.T @ gradient), (b, gradient @ a.T)):
            parameter.grad = own if parameter.grad is None else parameter.grad + own

    @torch.no_grad()
    def merge(self) -> None:
        """Writes W0 + scale/rank * B A into the target's weights."""
        for key, weight in self.weights.items():
            change = (self.b[key] @ self.a[key]).view_as(weight)
            weight.copy_(torch.add(self.starting_point[key], change, alpha=self.scale / self.rank))

    def after_step(
        self, state: TrainState, micro_batches: Sequence[Batch], source_outputs: Sequence[Outputs | None]
    ) -> dict[str, Tensor]:
        self.merge()
        return {}

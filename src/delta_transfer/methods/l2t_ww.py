"""L2T-ww: learning what and where to transfer (Jang, Lee, Hwang, Shin, ICML 2019), between different networks.

S_m is the source's feature map at tap m, (B, C_m, h, w). T_n is the target's at tap n, (B, C_n, g, g'). Source and
target may have different architectures. r_mn is a 1x1 convolution with bias, C_n -> C_m: an adapter, trained with the
target. S_m is resized bilinearly to T_n's size. M is a sum over pairs (m, n) of taps:

    M = sum_mn alpha * mean_b [ lambda_mn[b] * sum_c w_mn[b,c] * mean_pixels (S_m - r_mn(T_n))[b,c]^2 ]

    what:   w_mn = softmax_C(A_mn gap(S_m) + a_mn), (B, C_m), from A = a = 0
    where:  lambda_mn = relu6(e_mn . gap(S_m) + e0_mn), (B,), from e0 = 1

gap is the mean over pixels. The loss does not train the meta-networks phi = {A, a, e, e0}. They learn to weigh the maps
so that steps on M lead to a low cross-entropy, which `L2TWW.meta_step` differentiates through steps of SGD.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..common.errors import UserError
from ..common.options import option
from ..models import Network
from .attention import relative_entropy
from .base import (
    METHODS,
    NO_SHAPES,
    Batch,
    MapShapes,
    Outputs,
    SourceShapes,
    TrainState,
    added,
    full_precision,
    of_source,
)
from .fast.cuda_graph import Replayed
from .look_ahead import SGD, forward_with, meta_gradient
from .matching import FM, PAIRS, joined

# "where" as a function of the score e . gap(S) + e0. With relu_mean the score is e . gap(S) / C_m + e0.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu6": F.relu6, "relu": F.relu, "relu_mean": F.relu}
CONSTANT, OFF = "constant", "off"  # the other choices of "where"


class MetaNetwork(nn.Module):
    """The meta-networks of one pair map gap(S_m) (B, C_m) to w_mn (B, C_m) and lambda_mn (B, 1).

    A part that is switched off gives 1.

    With both off, w is 1/C_m, so that M is a mean over all elements.
    """

    def __init__(self, channels: int, what: bool, where: str):
        super().__init__()
        self.activation = where
        self.what: nn.Linear | None = None
        self.where: nn.Linear | None = None
        if what:
            self.what = nn.Linear(channels, channels)
            nn.init.zeros_(self.what.weight)
            nn.init.zeros_(self.what.bias)
        if where in ACTIVATIONS:
            self.where = nn.Linear(channels, 1)
            nn.init.ones_(self.where.bias)
        elif where == CONSTANT:
            self.k = nn.Parameter(torch.zeros(1))

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        w, amount = torch.ones_like(pooled), torch.ones_like(pooled[:, :1])
        if self.what is not None:
            w = self.what(pooled).softmax(dim=1)
        elif self.activation == OFF:
            w = w / pooled.shape[1]
        if self.where is not None:
            features = pooled / pooled.shape[1] if self.activation == "relu_mean" else pooled
            amount = ACTIVATIONS[self.activation](self.where(features))
        elif self.activation == CONSTANT:
            amount = amount * F.softplus(10 * self.k)
        return w, amount


@METHODS.register("l2t_w", "L2T-w")
@METHODS.register("l2t_ww", "L2T-ww")
class L2TWW(FM):
    """Loss = CE + M + beta/2 * ||head||^2. On each batch:

    1. SGD takes a step on the loss. phi is constant in it.
    2. From there SGD tries `inner_steps` steps on M alone and one on CE alone, and undoes them. The meta loss is CE
       after them. Adam takes a step on phi with the gradient of the meta loss through all these steps, momentum and
       weight decay included (`look_ahead.meta_gradient`).

    After step 2 the weights, the momentum and BatchNorm's statistics are those of step 1. Source: the paper and the
    authors' code (alinlab/L2T-ww at 023c642, train_l2t_ww.py). Deviation: there a forward pass after the roll-back
    updates the statistics a second time; here a step counts once, as for every method.

    alpha is the paper's beta, the factor of M. beta is the factor of the head's term, as in every method here; the
    published value is 0. pairs: all_to_all | one_to_one | single, see `choose_pairs`.
    what=False: w = 1, so that M sums over channels: C_m times their mean. where: relu6 | relu | relu_mean (reads
    gap(S_m) / C_m) | constant (lambda = softplus(10 k)) | off (lambda = 1). what=True with where="off" is L2T-w. With
    both off, phi is empty and M is feature matching: alpha times the mean of (S_m - r_mn(T_n))^2 over all its elements.
    meta_lr=0 skips step 2, so that phi keeps its initial values.

    With schedule.accumulate, BatchNorm sees the same micro-batches in step 2, but all of them stay in memory.
    `penalty` returns the terms "matching" and "head", and raises RuntimeError before `setup`.
    """

    alpha: float = option(0.5, "strength of the matching, the paper's beta", at_least=0)
    pairs: str = option(
        "all_to_all",
        "which maps are matched: all_to_all; one_to_one, taps of one size; or single, the last of one_to_one",
        choices=PAIRS,
    )
    what: bool = option(True, "whether the weights of channels are learned; false: a sum over channels")
    where: str = option(
        "relu6",
        "how the amount of each pair is learned; off: every pair counts 1",
        choices=(*ACTIVATIONS, CONSTANT, OFF),
    )
    inner_steps: int = option(2, "steps on the matching loss that are tried and undone in every step", above=0)
    meta_lr: float = option(1e-4, "learning rate of the meta-networks, by Adam; 0: they never learn", at_least=0)
    meta_weight_decay: float = option(1e-4, "weight decay of the meta-networks", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        looks_ahead = self.meta_lr > 0 and (self.what or self.where != OFF)
        self.needs = replace(type(self).needs, micro_batches_again=looks_ahead, same_steps=looks_ahead)
        self.meta_networks = nn.ModuleDict()
        self.adam: torch.optim.Adam | None = None
        self.replayed = Replayed()

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        if processes > 1:
            raise UserError("L2T-ww runs in one process: BatchNorm over several cannot be differentiated twice.")
        if self.needs.micro_batches_again and optimizer != "sgd":
            raise UserError(
                f"L2T-ww looks ahead by steps of SGD, not of {optimizer}: set optimizer=sgd, or reg.meta_lr=0."
            )

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        super().setup(target, map_shapes, source_shapes)
        channels = {pair.key: (source_shapes or map_shapes)[pair.source][0] for pair in self.matched}
        self.meta_networks = nn.ModuleDict(
            {key: MetaNetwork(count, self.what, self.where) for key, count in channels.items()}
        )
        if self.needs.micro_batches_again:
            phi = self.meta_networks.parameters()
            self.adam = torch.optim.Adam(phi, self.meta_lr, weight_decay=self.meta_weight_decay)

    def trained(self) -> list[nn.Parameter]:
        return list(self.adapters.parameters())

    # Adam's moments are part of the state, so that a resumed run goes on with them.
    def get_extra_state(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict() if self.adam else None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.adam:
            self.adam.load_state_dict(state["adam"])

    def weights(self, source_outputs: Outputs) -> dict[str, tuple[Tensor, Tensor]]:
        """w_mn (B, C_m) and lambda_mn (B, 1) of every pair, in full precision."""
        pooled = {pair.source: full_precision(source_outputs[pair.source]).mean(dim=(2, 3)) for pair in self.matched}
        return {pair.key: self.meta_networks[pair.key](pooled[pair.source]) for pair in self.matched}

    def products(self, weights: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """lambda_mn w_mn (B, C_m) of every pair, joined by target taps."""
        return joined(self.matched, {key: w * amount for key, (w, amount) in weights.items()})

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        """M as a part of the loss that trains target and adapters: phi gets no gradient."""
        with torch.no_grad():
            source_maps = joined(self.matched, self.source_maps(source_outputs))
            weights = self.weights(of_source(source_outputs))
            self.extra_metrics = {}
            if self.where != OFF:
                self.extra_metrics |= {f"attention_{key}": amount.mean() for key, (_, amount) in weights.items()}
            if self.what:  # 1: all channels alike
                entropies = [relative_entropy(w) for w, _ in weights.values()]
                self.extra_metrics["attention_entropy"] = torch.stack(entropies).mean()
            products = self.products(weights)
        return {"matching": self.matching(self.adapters(outputs), source_maps, products)} | self.head_penalty(target)

    def after_step(
        self, state: TrainState, micro_batches: Sequence[Batch], source_outputs: Sequence[Outputs | None]
    ) -> dict[str, Tensor]:
        if self.adam is None:
            return {}
        sources = [of_source(outputs) for outputs in source_outputs]
        return {"attention_meta_loss": self.meta_step(state, micro_batches, sources)}

    def meta_step(self, state: TrainState, micro_batches: Sequence[Batch], source_outputs: Sequence[Outputs]) -> Tensor:
        """Step 2: Adam's step on phi. Returns the meta loss. Nothing of `state` changes."""
        assert self.adam is not None
        groups = state.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        buffers = [state.optimizer.state[p].get("momentum_buffer") for p in parameters]
        velocity = [torch.zeros_like(p) if v is None else v for p, v in zip(parameters, buffers, strict=True)]
        # Filled on the device: a copy from Python would wait for it.
        rates = [parameters[0].new_full((), group["lr"]) for group in groups]
        source_maps = [joined(self.matched, self.source_maps(outputs)) for outputs in source_outputs]
        # M depends on phi only through these: `tried` gives the gradient with respect to them, and one backward pass
        # takes it on to phi.
        weights = [self.products(self.weights(outputs)) for outputs in source_outputs]
        made = [w for of_batch in weights for w in of_batch.values()]
        given = [
            *(batch.images for batch in micro_batches),
            *(batch.labels for batch in micro_batches),
            *(source_map for of_batch in source_maps for source_map in of_batch.values()),
            *made,
        ]
        tried = partial(self.tried, state, len(micro_batches))
        meta_loss, *gradients = self.replayed(tried, [*parameters, *velocity, *rates, *given])
        torch.autograd.backward(made, gradients, inputs=list(self.meta_networks.parameters()))
        self.adam.step()
        self.adam.zero_grad()
        return meta_loss

    def tried(self, state: TrainState, count: int, tensors: list[Tensor]) -> list[Tensor]:
        """The meta loss and its gradients with respect to lambda w, as a function of the tensors of `meta_step`.

        `tensors` are the parameters, the momentum of each, the learning rates of the optimizer's groups, and the
        images, labels, source maps and lambda w of `count` micro-batches, the last two for each target tap.
        """
        groups = state.optimizer.param_groups
        named = [p for group in groups for p in group["params"]]
        taps = list(dict.fromkeys(pair.target for pair in self.matched))
        cursor = iter(tensors)
        parameters, velocity = ([next(cursor) for _ in named] for _ in range(2))
        rates = [rate for group in groups for rate in [next(cursor)] * len(group["params"])]
        images, labels = ([next(cursor) for _ in range(count)] for _ in range(2))
        source_maps, weights = ([{tap: next(cursor).detach() for tap in taps} for _ in range(count)] for _ in range(2))
        constants = [w.requires_grad_(True) for of_batch in weights for w in of_batch.values()]

        def outputs(theta: list[Tensor]) -> Iterator[Outputs]:
            of_target = named_values(state.target.traced, named, theta)
            return (forward_with(state.target, of_target, batch, state.precision) for batch in images)

        def matching(theta: list[Tensor]) -> Tensor:
            of_adapters = named_values(self.adapters, named, theta)
            losses = []
            for of_batch, source_map, weight in zip(outputs(theta), source_maps, weights, strict=True):
                adapted = functional_call(self.adapters, of_adapters, (of_batch,))
                losses.append(self.matching(adapted, source_map, weight))
            return torch.stack(losses).mean()

        def task(theta: list[Tensor]) -> Tensor:
            losses = [
                added(list(state.task_loss(of_batch, of_labels).values()))
                for of_batch, of_labels in zip(outputs(theta), labels, strict=True)
            ]
            return torch.stack(losses).mean()

        inner, sgd = [matching] * self.inner_steps + [task], SGD.of(state.optimizer, rates)
        meta_loss, gradients = meta_gradient(inner, task, parameters, velocity, constants, sgd)
        return [meta_loss, *gradients]


def named_values(module: nn.Module, parameters: list[nn.Parameter], values: list[Tensor]) -> dict[str, Tensor]:
    """The `values` of those `parameters` that `module` has, by their names in it."""
    by_parameter = dict(zip(parameters, values, strict=True))
    return {name: by_parameter[p] for name, p in module.named_parameters() if p in by_parameter}

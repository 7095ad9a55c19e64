"""L2T-ww: learning what and where to transfer (Jang, Lee, Hwang, Shin, ICML 2019), between different networks.

S_m is the source's feature map at tap m, (B, C_m, h, w), T_n the target's at tap n, (B, C_n, g, g'); source and target
need not be of one architecture. r_mn is a 1x1 convolution with bias, C_n -> C_m: a matcher, trained with the target.
S_m is resized bilinearly to T_n's size. Over pairs (m, n) of taps

    M = sum_mn alpha * mean_b [ lambda_mn[b] * sum_c w_mn[b,c] * mean_pixels (S_m - r_mn(T_n))[b,c]^2 ]

    what:   w_mn = softmax_C(A_mn gap(S_m) + a_mn), (B, C_m), from A = a = 0
    where:  lambda_mn = relu6(e_mn . gap(S_m) + e0_mn), (B,), from e0 = 1

gap is the mean over pixels. phi = {A, a, e, e0}, the meta-networks, are no part of what the loss trains: what they
weigh is to lead to a low cross-entropy, which `L2TWW.meta_step` differentiates through steps of SGD.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..common.errors import UserError
from ..engine import processes as distributed
from ..models import Network
from .base import NO_SHAPES, MapShapes, Outputs, OutputShapes, Part, TrainState, one_of, relative_entropy
from .distances import full_precision
from .fast.cuda_graph import Replayed
from .look_ahead import SGD, meta_gradient
from .matching import FM, joined

# "where": of the score e . gap(S) + e0; relu_mean is given gap(S) / C_m.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu6": F.relu6, "relu": F.relu, "relu_mean": F.relu}
CONSTANT, OFF = "constant", "off"  # the other choices of "where"


class MetaNetwork(nn.Module):
    """Of one pair: gap(S_m) (B, C_m) -> w_mn (B, C_m) and lambda_mn (B, 1). What is switched off is 1.

    With both off w = 1/C_m, so that M is a mean over all elements.
    """

    def __init__(self, channels: int, what: bool, where: str):
        super().__init__()
        self.activation = where
        self.what = self.where = None
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


class L2TWW(FM):
    """Loss = CE + M + beta/2 * ||head||^2, and after each step on it one of Adam on phi, on the same batch:

    1. The step of SGD on the loss is kept. phi is constant in it.
    2. Tried from there, and forgotten: `inner_steps` steps of SGD on M alone, then one on CE alone. CE after them is
       the meta loss. It is differentiated with respect to phi through all these steps, momentum and weight decay
       included (`look_ahead.meta_gradient`), for the step of Adam.

    Weights, momentum and BatchNorm's statistics are those of step 1 when all this is over. (In the authors' code a
    forward pass after the roll-back updates the statistics a second time.)

    alpha is the paper's beta, the factor of M; beta (0 as published) is that of the head, as in every method here.
    pairs: all_to_all | one_to_one | single, see `choose_pairs`.
    what=False: w = 1, a sum over channels, C_m times a mean. where: relu6 | relu | relu_mean (of
    gap(S_m) / C_m) | constant, lambda = softplus(10 k) | off, lambda = 1. what=True with where="off" is L2T-w. With
    both off there is nothing to learn, and M is feature matching: alpha times the mean of (S_m - r_mn(T_n))^2 over all
    its elements.
    meta_lr=0 leaves phi as it begins, and step 2 out.

    With schedule.accumulate, BatchNorm sees the same parts in step 2, but all of them are kept in memory.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.0,
        weight_decay: float = 1e-4,
        pairs: str = "all_to_all",
        what: bool = True,
        where: str = "relu6",
        inner_steps: int = 2,
        meta_lr: float = 1e-4,
        meta_weight_decay: float = 1e-4,
    ):
        super().__init__(alpha, beta, weight_decay, pairs)
        self.what, self.where = what, one_of("where", where, *ACTIVATIONS, CONSTANT, OFF)
        self.inner_steps, self.meta_lr, self.meta_weight_decay = inner_steps, meta_lr, meta_weight_decay
        self.meta_networks = nn.ModuleDict()
        self.adam: torch.optim.Adam | None = None
        self.replayed = Replayed()

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        if distributed.processes() > 1:
            raise UserError("L2T-ww runs in one process: BatchNorm over several cannot be differentiated twice.")
        super().start(target, map_shapes, source_shapes)
        channels = {pair.key: (source_shapes or map_shapes)[pair.source][0] for pair in self.pairs}
        self.meta_networks = nn.ModuleDict(
            {key: MetaNetwork(count, self.what, self.where) for key, count in channels.items()}
        )
        phi = list(self.meta_networks.parameters())
        learns = phi and self.meta_lr > 0
        self.adam = torch.optim.Adam(phi, self.meta_lr, weight_decay=self.meta_weight_decay) if learns else None
        self.returns_to_batch = self.adam is not None

    def trained(self) -> list[nn.Parameter]:
        return list(self.matchers.parameters())

    # Adam's moments are part of the state, so that a resumed run goes on with them.
    def get_extra_state(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict() if self.adam else None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.adam:
            self.adam.load_state_dict(state["adam"])

    def weights(self, source_outputs: Outputs) -> dict[str, tuple[Tensor, Tensor]]:
        """w_mn (B, C_m) and lambda_mn (B, 1) of every pair, in full precision."""
        pooled = {pair.source: full_precision(source_outputs[pair.source]).mean(dim=(2, 3)) for pair in self.pairs}
        return {pair.key: self.meta_networks[pair.key](pooled[pair.source]) for pair in self.pairs}

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs) -> dict[str, Tensor]:
        """M as a part of the loss that trains target and matchers: phi gets no gradient."""
        with torch.no_grad():
            references, weights = joined(self.pairs, self.references(source_outputs)), self.weights(source_outputs)
            self.observed = {}
            if self.where != OFF:
                self.observed |= {f"attention_{key}": amount.mean() for key, (_, amount) in weights.items()}
            if self.what:  # 1: all channels alike
                entropies = [relative_entropy(w) for w, _ in weights.values()]
                self.observed["attention_entropy"] = torch.stack(entropies).mean()
            products = self.products(weights)
        return {"matching": self.matching(self.matchers(outputs), references, products)} | self.head_penalty(target)

    def products(self, weights: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """lambda_mn w_mn (B, C_m) of every pair, joined by target taps."""
        return joined(self.pairs, {key: w * amount for key, (w, amount) in weights.items()})

    def after_step(self, learner: TrainState, parts: list[Part]) -> dict[str, Tensor]:
        return {"attention_meta_loss": self.meta_step(learner, parts)}

    def meta_step(self, learner: TrainState, parts: list[Part]) -> Tensor:
        """Step 2: Adam's step on phi; returns the meta loss. Nothing of `learner` changes."""
        groups = learner.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        buffers = [learner.optimizer.state[p].get("momentum_buffer") for p in parameters]
        velocity = [torch.zeros_like(p) if v is None else v for p, v in zip(parameters, buffers, strict=True)]
        # Filled on the device: a copy from Python would wait for it.
        rates = [parameters[0].new_full((), group["lr"]) for group in groups]
        references = [joined(self.pairs, self.references(source_outputs)) for _, _, source_outputs in parts]
        # M depends on phi through these alone: the steps are differentiated as far as here, and then once through phi.
        weights = [self.products(self.weights(source_outputs)) for _, _, source_outputs in parts]
        made = [w for part in weights for w in part.values()]
        images, labels, _ = zip(*parts, strict=True)
        given = [*images, *labels, *(reference for part in references for reference in part.values()), *made]
        meta_loss, *gradients = self.replayed(partial(self.tried, learner), [*parameters, *velocity, *rates, *given])
        torch.autograd.backward(made, gradients, inputs=list(self.meta_networks.parameters()))
        self.adam.step()
        self.adam.zero_grad()
        return meta_loss

    def tried(self, learner: TrainState, tensors: list[Tensor]) -> list[Tensor]:
        """Meta loss, and its gradients with respect to lambda w, as a function of the tensors of `meta_step`.

        They are parameters and momentum of each, the learning rates of the optimizer's groups, then images, labels,
        references and lambda w of the parts of the batch, the latter two by target taps.
        """
        groups = learner.optimizer.param_groups
        named = [p for group in groups for p in group["params"]]
        taps = list(dict.fromkeys(pair.target for pair in self.pairs))
        count = learner.accumulate
        cursor = iter(tensors)
        parameters, velocity = ([next(cursor) for _ in named] for _ in range(2))
        rates = [rate for group in groups for rate in [next(cursor)] * len(group["params"])]
        images, labels = ([next(cursor) for _ in range(count)] for _ in range(2))
        references, weights = ([{tap: next(cursor).detach() for tap in taps} for _ in range(count)] for _ in range(2))
        constants = [w.requires_grad_(True) for part in weights for w in part.values()]

        def matching(theta: list[Tensor]) -> Tensor:
            of_target, of_matchers = self._named(learner.target, named, theta)
            losses = []
            for part, reference, weight in zip(images, references, weights, strict=True):
                matched = functional_call(self.matchers, of_matchers, (learner.forward_with(of_target, part),))
                losses.append(self.matching(matched, reference, weight))
            return torch.stack(losses).mean()

        def task(theta: list[Tensor]) -> Tensor:
            of_target, _ = self._named(learner.target, named, theta)
            losses = [
                sum(learner.task_loss(learner.forward_with(of_target, part), part_labels).values())
                for part, part_labels in zip(images, labels, strict=True)
            ]
            return torch.stack(losses).mean()

        inner, sgd = [matching] * self.inner_steps + [task], SGD.of(learner.optimizer, rates)
        meta_loss, gradients = meta_gradient(inner, task, parameters, velocity, constants, sgd)
        return [meta_loss, *gradients]

    def _named(self, target: Network, parameters: list[nn.Parameter], theta: list[Tensor]) -> tuple[dict, dict]:
        """`theta`, values of `parameters`, under the names that they have in the target and in the matchers."""
        values = dict(zip(parameters, theta, strict=True))
        networks = target.traced, self.matchers
        return tuple({name: values[p] for name, p in net.named_parameters() if p in values} for net in networks)

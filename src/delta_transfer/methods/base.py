"""The contract between the training loop and a method."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..models import Network

Outputs = dict[str, Tensor]  # what Network.forward returns; in `penalty` also the "labels" of the images, (B,)
MapShapes = Mapping[str, tuple[int, int, int]]  # by tap
OutputShapes = Mapping[str, tuple[int, ...]]  # of what a network returns, by its keys: (C, H, W), logits (K,)
NO_SHAPES: MapShapes = MappingProxyType({})
Part = tuple[Tensor, Tensor, Outputs | None]  # of a batch: images, labels, and what the source makes of the images
# Images (B, 3, H, W), or whatever inputs models.call hands to the network, and labels (B,); each iteration is one pass.
Batches = Iterable[tuple[Any, Tensor]]


class TrainState(Protocol):
    """What a method is given of the training loop: training.Learner."""

    target: Network
    optimizer: torch.optim.SGD
    precision: str  # fp32 | bf16
    accumulate: int  # parts of a batch

    def forward(self, images: Tensor) -> Outputs:
        """Of the target, in that precision."""

    def forward_with(self, parameters: dict[str, Tensor], images: Tensor) -> Outputs:
        """The same with other values of the target's parameters, which can be differentiated twice."""

    def forward_source(self, images: Tensor) -> Outputs:
        """Of the frozen source."""

    def task_loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, in fp32, and that of an auxiliary head."""

    def split(self, *batch: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A batch's tensors in `accumulate` parts."""

    def backward(self, loss: Tensor) -> None:
        """Of one part."""

    def step(self) -> None:
        """Of the optimizer, once for all parts."""


@dataclass(frozen=True)
class Stage:
    """A part of a run that is trained like a run: a schedule and an optimizer of its own, from where the last ended."""

    regularizer: "Regularizer"
    lr_factor: float = 1.0  # of schedule.lr
    aligned_to: str = "source"  # the frozen network: source, or previous, the target that the stage before left


class Regularizer(nn.Module):
    """What a method adds to fine-tuning. Subclass it, override what differs, add it to REGULARIZERS.

    A subclass takes the keys of its conf/reg/<name>.yaml (without `name`) as keyword arguments.
    """

    needs_source: ClassVar[bool] = False  # a frozen source network, run on every batch for its feature maps
    needs_source_logits: ClassVar[bool] = False  # its logits too, which otherwise are not computed
    needs_taps: ClassVar[bool] = False  # tapped feature maps of target (and source)
    any_source: ClassVar[bool] = False  # the source may be of another architecture than the target
    replaces_batchnorm: bool = False  # `start` puts layers of its own in the place of the target's
    freezes_backbone: ClassVar[bool] = False  # train the head only; the whole network stays in evaluation mode
    fitted_name: ClassVar[str | None] = None  # name of the file that keeps what `fit` computed
    views: ClassVar[int] = (
        1  # of each image of a batch, with crops of their own; `update` is given those beyond the first
    )
    fits_plain: ClassVar[bool] = False  # `fit` sees the centre crop of every image once, not training batches
    fitted_term: str | None = None  # the name of this method in a sum
    fit_seed: int = 0  # of the order and crops of the batches that `fit` sees
    # Parts that a batch is dealt in, over processes and by accumulation. The loss is the mean over parts: a penalty
    # that is a sum over the batch multiplies by them.
    parts: int = 1
    returns_to_batch: bool = False  # `after_step` needs the parts of the batch again

    def __init__(self, beta: float = 0.0, weight_decay: float = 0.0):
        super().__init__()
        not_negative(beta=beta, weight_decay=weight_decay)
        self.fit_report: dict[str, float] = {}
        # Scalars that `penalty` saw, for the log beside its terms; names begin with "attention_".
        self.observed: dict[str, Tensor] = {}
        self.beta = beta
        self.weight_decay = weight_decay  # of the optimizer

    def stages(self) -> list[Stage]:
        """What is trained one after the other; each takes `schedule` once more."""
        return [Stage(self)]

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        """Called with the initial target network, before training and before a checkpoint is loaded.

        It may change the target: the values of its head, or layers for others with the same parameters.
        map_shapes: (C, H, W) of each tapped feature map; for methods whose own modules depend on it.
        source_shapes: of all that the source returns, also its logits; None: the source has the target's taps.
        """

    def trained(self) -> list[nn.Parameter]:
        """Parameters of its own that the optimizer trains with the target, on the same loss."""
        return list(self.parameters())

    def trained_slowly(self) -> list[nn.Parameter]:
        """Those of `trained` that have the backbone's learning rate, as what comes from the source has."""
        return []

    def to_fit(self) -> list["Regularizer"]:
        """The methods whose `fit` is called: itself if it has a `fitted_name`; of a sum its terms."""
        return [self] if self.fitted_name else []

    def fit_options(self) -> dict[str, Any]:
        """Options that decide the result of `fit`, beside `fit_seed`: it is reused where they are the same."""
        return {}

    @property
    def fit_key(self) -> str:
        """Of the configuration, below which the options of `fit` stand."""
        return f"reg.terms.{self.fitted_term}" if self.fitted_term else "reg"

    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """Compute, once before training, what the penalty needs; called only if `fitted_name` is set.

        `source` is frozen. Returns named tensors that are stored and handed to `load_fitted`.
        """
        raise NotImplementedError

    def rehearse(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        """For a dry run, from a few timed passes of `images`: a stand-in for what `fit` returns, and its cost.

        The cost is in seconds per training image, and in seconds beside that.
        """
        raise NotImplementedError

    def load_fitted(self, fitted: dict[str, Tensor]) -> None:
        """Take over what `fit` returned, now or in an earlier run; may set `fit_report`, figures for the record."""
        raise NotImplementedError

    def before_step(self, learner: TrainState, step: int, steps: int, seed: int) -> None:
        """Called before step number `step` of `steps` in this stage, counted from 0; may change target and optimizer.

        seed: for what is drawn here. It follows from seed and iteration, and is the same in all processes.
        """

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        """Named scalar terms, added to the cross-entropy and logged one by one.

        outputs: what `target` returns for the batch, and "labels" (B,) beside it, for the methods that need them.
        source_outputs: what the source returns for it, without gradients; None if `needs_source` is False.
        """
        return self.head_penalty(target)

    def head_penalty(self, target: Network) -> dict[str, Tensor]:
        """beta * 1/2 * (||W||^2 + ||bias||^2) of the new head (official DELTA code)."""
        if self.beta == 0:
            return {}
        total = sum(p.square().sum() for p in target.head_parameters().values())
        return {"head": 0.5 * self.beta * total}

    def update(self, learner: TrainState, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One optimisation step; returns the logits (B, K) and the loss terms.

        A method with further `views` takes them as further arguments, shaped like `images`, in an `update` of its own.
        Whoever overrides it calls `step_on`, or `learner.backward` for each part of `learner.split` and then
        `learner.step`, once.
        """
        parts = self.parts_of(learner, images, labels)
        if not self.returns_to_batch:
            return self.step_on(learner, parts)
        parts = list(parts)
        result = self.step_on(learner, parts)
        self.observed = self.observed | self.after_step(learner, parts)
        return result

    def after_step(self, learner: TrainState, parts: list[Part]) -> dict[str, Tensor]:
        """What a method does with the same batch after the step, if it `returns_to_batch`; returns what it observed.

        Nothing of `learner` may change.
        """
        raise NotImplementedError

    def parts_of(self, learner: TrainState, images: Tensor, labels: Tensor) -> Iterator[Part]:
        for part, part_labels in learner.split(images, labels):
            yield part, part_labels, learner.forward_source(part) if self.needs_source else None

    def step_on(self, learner: TrainState, parts: Iterable[Part]) -> tuple[Tensor, dict[str, Tensor]]:
        """A step on cross-entropy and penalty, over all parts of a batch; returns what `update` does."""
        logits, terms, observed = [], [], []
        for part, part_labels, source_outputs in parts:
            outputs = learner.forward(part)
            outputs["labels"] = part_labels
            losses = learner.task_loss(outputs, part_labels) | self.penalty(learner.target, outputs, source_outputs)
            logits.append(outputs["logits"].detach())
            del outputs, source_outputs  # not needed while the backward pass fills the memory
            learner.backward(sum(losses.values()))
            terms.append({name: loss.detach() for name, loss in losses.items()})
            observed.append(self.observed)
        learner.step()
        self.observed = mean_of(observed)
        return torch.cat(logits), mean_of(terms)


def not_negative(**values: float) -> None:
    """Raises ValueError for a strength that would turn a penalty round, or is no finite number."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number from 0 on, got {value}.")


def one_of(name: str, value: str, *choices: str) -> str:
    """`value`. Raises ValueError if it is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
    return value


def of_source(source_outputs: Outputs | None) -> Outputs:
    """What the source makes of the batch. Raises UserError if `penalty` was not given it."""
    if source_outputs is None:
        raise UserError("penalty() needs what the source returns for the same inputs, as source(images) does.")
    return source_outputs


def labels_of(outputs: Outputs) -> Tensor:
    """Of the batch, (B,). Raises UserError if `penalty` was not given them."""
    if "labels" not in outputs:
        raise UserError('penalty() of this method needs the labels of the batch: outputs["labels"] = labels.')
    return outputs["labels"]


def taps_of(target: Network) -> tuple[str, ...]:
    """Raises UserError if there are none: a penalty on no maps would be 0 in silence."""
    if not target.taps:
        raise UserError("This network has no tapped maps: name them, as in tapped(model, head=..., taps=[...]).")
    return target.taps


def module_name(key: str) -> str:
    """Of a module that belongs to a tap or another output: it may not have dots in it."""
    return key.replace(".", "/")


def relative_entropy(weights: Tensor) -> Tensor:
    """Of (B, K) that sum to 1 over K, the mean over the batch: 1 if all K are alike, as a single one is."""
    if weights.shape[1] == 1:
        return weights.new_ones(())
    return torch.special.entr(weights).sum(dim=1).mean() / math.log(weights.shape[1])


def mean_of(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of each name's scalars."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}

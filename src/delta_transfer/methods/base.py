"""The contract between the training loop and a method.

A method is a `Regularizer` in a file of its own, with its options and a decorator that names it:

    @METHODS.register("mine", "Mine")
    class Mine(Penalty):
        width: int = option(3, "how many neighbours are compared", above=0)

Every annotated attribute of the class is an option, and an argument of its constructor.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, dataclass_transform, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.console import shorten_list
from ..common.errors import UserError
from ..common.options import MISSING, OptionError, Options, Registry, from_mapping, option
from ..models import Network
from .unfinished import NOTHING_KEPT, Unfinished

T = TypeVar("T", bound=Options)
Outputs = dict[str, Tensor]  # what Network.forward returns; the loop adds the "labels" of the images, (B,)
MapShapes = Mapping[str, tuple[int, int, int]]  # (C, H, W) by tap
OutputShapes = Mapping[str, tuple[int, ...]]  # by what a network returns: (C, H, W) of a map, (K,) of logits
SourceShapes = OutputShapes | None
UNLABELLED = -100  # a label that is left out, as in torch.nn.functional.cross_entropy
NO_SHAPES: MapShapes = MappingProxyType({})
# Pairs of images (B, 3, H, W), or whatever inputs models.call hands to the network, and labels (B,). Each iteration is
# one pass over the training images.
Batches = Iterable[tuple[Any, Tensor]]
# The loss of logits (B, K) and labels, as F.cross_entropy: reduction="mean" (the default), "sum", or "none" for (B,).
SampleLoss = Callable[..., Tensor]


@dataclass
class MethodConfig(Options):
    """A method in a configuration: its name, and in a subclass the options of the method's class (`config_of`)."""

    key: ClassVar[str] = "reg"

    name: str = option(help="name of the method")

    def check(self) -> None:
        if self.name != MISSING:
            self.build()  # which checks them

    def build(self) -> "Regularizer":
        """The method that these options describe. Raises OptionError for options of another method than `name`."""
        method = METHODS[self.name]
        if not isinstance(self, method.options):
            raise OptionError(
                METHODS.key,
                f"reg.name={self.name} does not take the options of this file of conf/reg: choose a method by "
                f"reg={self.name}, or write /schema/reg@_here_: {self.name} in yours.",
            )
        return method.thing(**{entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "name"})

    @property
    def title(self) -> str:
        """How reports write the method's name."""
        return METHODS[self.name].title


@dataclass(frozen=True)
class Needs:
    """What a method needs of a run, beside the target network, its images and its labels."""

    source: bool = False  # the frozen source network runs on every micro-batch
    source_logits: bool = False  # its logits and its embedding too, which otherwise are not computed
    source_head: bool = False  # the source's own head must have been trained
    taps: bool = False  # tapped feature maps of the target, and of the source where it runs
    random_start: bool = False  # the target begins with random weights
    other_sources: bool = False  # the source may be of another architecture than the target
    fitted: str | None = None  # `fit` is called; its result is kept in a file of this name
    fit_on: Literal["training crops", "centre crops"] = "training crops"  # what `fit` sees of the training images
    views: int = 1  # crops of each image; the loop adds those beyond the first to the outputs as "view_2", ...
    frozen_backbone: bool = False  # only the head is trained; the whole network stays in evaluation mode
    own_batchnorm: bool = False  # `setup` replaces the target's BatchNorm layers
    micro_batches_again: bool = False  # `after_step` gets the micro-batches of the step
    same_steps: bool = False  # it computes steps of the optimizer itself, without clipping, with one weight decay
    own_steps: bool = False  # it changes what a step of the optimizer does
    idle_hooks: bool = False  # with these options before_step and after_step do nothing
    images: bool = False  # the inputs are images, whose maps have a height and a width
    one_label: bool = False  # each input has one label of K classes


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W), their labels (B,), and further views of the images, shaped like them.

    Other tasks put their inputs, such as graphs, in the place of images. These have a device, and `chunk` and `split`
    as tensors do.
    """

    images: Any
    labels: Tensor
    views: tuple[Any, ...] = ()

    def split(self, count: int) -> "list[Batch]":
        """`count` micro-batches of equal size."""
        if count == 1:
            return [self]
        tensors = zip(*(values.chunk(count) for values in (self.images, self.labels, *self.views)), strict=True)
        return [Batch(images, labels, tuple(views)) for images, labels, *views in tensors]


class TrainState(Protocol):
    """What a method may read of the training loop's state; engine.loop.TrainState implements it."""

    target: Network
    optimizer: torch.optim.Optimizer
    precision: str  # fp32 | bf16

    def task_loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """The task's loss in fp32, and that of an auxiliary head where there is one."""
        ...


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own optimizer and a whole schedule. It starts where the previous stage ended."""

    method: "Regularizer"
    lr_factor: float = 1.0  # multiplies schedule.lr
    alignment_target: str = "source"  # the frozen network: source, or previous: the previous stage's final target


@dataclass_transform(eq_default=False)
class Regularizer(Options, nn.Module):
    """What a method adds to fine-tuning.

    A run calls `requires`, then `fit` and `setup` once, and in every step `before_step`, `penalty` and `after_step`.
    A subclass is a dataclass of its options: their checked values are arguments of its constructor. It makes everything
    else in `__post_init__`.
    """

    key: ClassVar[str] = "reg"
    Config: ClassVar[type[MethodConfig]]
    needs: Needs = Needs()
    alpha: float = 0.0  # strength of the penalty on the backbone
    beta: float = 0.0  # strength of the L2 penalty on the new head
    weight_decay: float = 0.0  # of the optimizer
    # The number of micro-batches, in all processes, that the loss is averaged over. A penalty that is a sum over the
    # batch multiplies by it.
    loss_scale: int = 1
    sample_loss: SampleLoss = staticmethod(F.cross_entropy)  # the task's, for heads that a method trains itself
    memory_option: str | None = None  # the key, below reg, that bounds the memory of `fit`
    fit_seed: int = 0  # seed of the order and the crops of the batches that `fit` sees
    fit_batch_size: int | None = None  # images in each of these batches; None: as many as in training
    most_fit_images: float = math.inf  # training images at most that each pass of `fit` sees
    term: str | None = None  # the name of this method in a sum
    skips_source: bool = False  # this step needs nothing of the source; `before_step` sets it
    unfinished: Unfinished = NOTHING_KEPT  # is told of the parts of a long `fit`

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclass(cls, eq=False, repr=False)

    def __init__(self) -> None:
        self.__post_init__()

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        if type(self) is not Regularizer:
            super().__post_init__()
        self.fitted: dict[str, Tensor] = {}  # what `fit` returned
        self.fit_report: dict[str, float] = {}  # figures for the run's record, which `load_fitted` sets
        # Scalars that `penalty` saw, for the log beside its terms. Their names begin with "attention_".
        self.extra_metrics: dict[str, Tensor] = {}

    def stages(self) -> list[Stage]:
        """The stages of training, in order. Each takes the whole schedule."""
        return [Stage(self)]

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        """Raises UserError if the method cannot work, or would do nothing, on this model or with this optimizer.

        A run calls it before it reads any data. model: the target's architecture, whose parameters have no values
        (device meta). optimizer: its registered name. processes: how many share the run.
        """

    # --- Before training ---

    def parts_to_fit(self) -> list["Regularizer"]:
        """The methods whose `fit` is called: itself if it needs that; the terms of a sum that need it."""
        return [self] if self.needs.fitted else []

    def fit_options(self) -> dict[str, Any]:
        """Options that decide the result of `fit`, beside `fit_seed`. A result is reused where they are the same."""
        return {}

    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """Computes, once before training, what the penalty needs. Called only where `needs.fitted` names a file.

        `source` is frozen. Returns named tensors, which are stored and handed to `load_fitted`.
        """
        raise NotImplementedError

    def estimate_fit(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        """A stand-in for the result of `fit` and its cost, from a few timed passes of `images`, for a dry run.

        The cost is in seconds per training image, up to `most_fit_images`, and in seconds that do not depend on their
        number.
        """
        raise NotImplementedError

    def load_fitted(self, fitted: dict[str, Tensor]) -> None:
        """Takes over what `fit` returned, now or in an earlier run. It may set `fit_report`."""
        self.fitted = dict(fitted)

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        """Called with the initial target network, before training and before a checkpoint is loaded.

        It may change the values of the target's head, replace layers by others with the same parameters, and choose
        which parameters have a gradient.
        map_shapes: (C, H, W) of each tapped feature map, for methods whose own modules depend on it.
        source_shapes: shapes of all outputs of the source, logits included. None: the source has the target's taps.
        """

    def trained(self) -> list[nn.Parameter]:
        """Parameters of its own that the optimizer trains with the target, on the same loss."""
        return list(self.parameters())

    def trained_in_backbone(self, target: Network) -> dict[str, nn.Parameter]:
        """Parameters of the target's backbone that the optimizer trains: those that `setup` left with a gradient."""
        return {name: p for name, p in target.backbone_parameters().items() if p.requires_grad}

    def trained_slowly(self) -> list[nn.Parameter]:
        """Those of `trained` that have the backbone's learning rate, since they come from the source as it does."""
        return []

    # --- In every step ---

    def before_step(self, state: TrainState, step: int, steps: int, seed: int) -> None:
        """Called before step `step` of `steps` in this stage, counted from 0. It may change target and optimizer.

        seed: for random draws here. It follows from seed and iteration, and is the same in all processes.
        """

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        """Named scalar terms, which are added to the cross-entropy and logged one by one.

        outputs: what `target` returns for the micro-batch, with its "labels" (B,) and further views beside it.
        source_outputs: what the frozen source returns for it; None unless the method needs a source in this step.
        """
        return self.head_penalty(target)

    def after_step(
        self, state: TrainState, micro_batches: Sequence[Batch], source_outputs: Sequence[Outputs | None]
    ) -> dict[str, Tensor]:
        """Called after the optimizer's step; returns further extra metrics.

        In `state` it may change only weights of the target that the method computes and the optimizer does not train.

        The two sequences are empty unless the method needs the micro-batches again.
        """
        return {}

    def head_penalty(self, target: Network) -> dict[str, Tensor]:
        """beta * 1/2 * (||W||^2 + ||bias||^2) of the new head (lixingjian/DELTA at 45054d4)."""
        if self.beta == 0:
            return {}
        squares = [p.square().sum() for p in target.head_parameters().values()]
        return {"head": 0.5 * self.beta * sum(squares[1:], squares[0])}


DECAY = "weight decay of the optimizer, on every trained parameter"


class WithoutPenalty(Regularizer):
    """A method without a penalty; it has weight decay alone."""

    weight_decay: float = option(1e-4, DECAY, at_least=0)


class Penalty(Regularizer):
    """A method with a penalty."""

    alpha: float = option(0.0, "strength of the penalty on the backbone", at_least=0)
    beta: float = option(0.0, "strength of the L2 penalty on the new head", at_least=0)
    weight_decay: float = option(0.0, DECAY, at_least=0)


class FeaturePenalty(Penalty):
    """A penalty on features that counts only in the steps 0, k, 2k, ... of a stage, k times as strong; k is `every`.

    The mean strength over a run is therefore that of every=1. The frozen source runs only in these steps.
    """

    every: int = option(
        1,
        "k: the penalty on features counts in every k-th step, k times as strong, which saves time in the other steps",
        at_least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.times: int | None = 1 if self.every == 1 else None  # factor of this step's penalty

    def before_step(self, state: TrainState, step: int, steps: int, seed: int) -> None:
        self.count_from(step)

    def count_from(self, step: int) -> None:
        """Sets the number of the next step, from 0. In a loop of your own call it before each step, if every > 1."""
        self.times = self.every if step % self.every == 0 else 0
        self.skips_source = self.times == 0

    def in_this_step(self, omega: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The penalty `omega()`, times `every` or left out. like: any tensor of the target's device."""
        if self.times is None:
            raise RuntimeError(f"{type(self).__name__} with every={self.every} needs count_from(step) each step.")
        return self.times * omega() if self.times else full_precision(like).new_zeros(())


def config_of(method: type[Regularizer]) -> type[MethodConfig]:
    """`method.Config`, the group `reg` of a configuration: a name beside the options of the class."""
    if "Config" not in vars(method):
        hints = get_type_hints(method)
        options = [(entry.name, hints[entry.name], entry) for entry in fields(method)]  # type: ignore[arg-type]
        config: type[MethodConfig] = make_dataclass(f"{method.__name__}Config", options, bases=(MethodConfig,))
        config.version = method.version
        config.__module__, config.__qualname__ = method.__module__, f"{method.__qualname__}.Config"  # to be pickled
        method.Config = config
    return method.Config


METHODS: Registry[type[Regularizer]] = Registry("reg.name", config_of)


def of_source(source_outputs: Outputs | None) -> Outputs:
    """What the source returns for the batch. Raises UserError if `penalty` was not given it."""
    if source_outputs is None:
        raise UserError("penalty() needs what the source returns for the same inputs: pass source(images).")
    return source_outputs


def labels_of(outputs: Outputs) -> Tensor:
    """The labels of the batch, (B,). Raises UserError if `penalty` was not given them."""
    if "labels" not in outputs:
        raise UserError('penalty() of this method needs the labels of the batch: set outputs["labels"] = labels.')
    return outputs["labels"]


def options_in(group: type[T], options: T | Mapping[str, Any] | None) -> T:
    """The checked options of a group. A mapping holds what differs from the defaults; OptionError for unknown names."""
    return from_mapping(group, options or {}) if options is None or isinstance(options, Mapping) else options


def of_tap(outputs: Outputs, tap: str, like: Tensor | None = None) -> Tensor:
    """The map at `tap` in what a source returned. Raises UserError if it has none, or one of another shape.

    like: the target's map, which it is compared with.
    """
    if tap not in outputs:
        raise UserError(f"The source returns no map at {tap!r}, only {shorten_list(list(outputs))}: tap it there, too.")
    found = outputs[tap]
    if like is not None and (found.shape != like.shape or found.device != like.device):
        raise UserError(
            f"The maps at {tap!r} cannot be compared: the target's has the shape {tuple(like.shape)} on {like.device}, "
            f"the source's {tuple(found.shape)} on {found.device}. Pass source(images) for the same images."
        )
    return found


def taps_of(target: Network) -> tuple[str, ...]:
    """The target's taps. Raises UserError if there are none, since a penalty on no maps would be 0 in silence."""
    if not target.taps:
        raise UserError(
            "This method compares feature maps, but the network has no taps: name some with backbone.taps, or with "
            "tapped(model, head=..., taps=[...])."
        )
    return target.taps


def module_name(key: str) -> str:
    """The name of a module that belongs to a tap or another output; module names have no dots."""
    return key.replace(".", "/")


def full_precision(values: Tensor) -> Tensor:
    """`values` in fp32, also under autocast; double stays double."""
    return values if values.dtype == torch.float64 else values.float()


def added(values: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, of which there is at least one."""
    return sum(values[1:], values[0])

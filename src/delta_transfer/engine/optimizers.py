"""How a run is optimised: the schedule with its learning rate, and optimizers by name.

The learning rate is a pure function of the step. A new decay of it is a function with the decorator `decay`; a new
optimizer is a function with the decorator `OPTIMIZERS.register`, with its options beside it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..common.options import LARGEST_BATCH, LARGEST_SIDE, LONGEST, Options, Registry, option
from ..methods.base import Regularizer
from ..models import Network
from .layer_decay import depths_below_head

# --- Schedule and learning rate ---

# By the name in schedule.decay, the factor on the learning rate in step number `step` of `steps`, counted from 0. With
# schedule.decay_per_epoch `step` is the start of the pass over the images, and may be a fraction.
Decay = Callable[["ScheduleConfig", float, int], float]
DECAYS: dict[str, Decay] = {}


def decay(function: Decay) -> Decay:
    """Registers a function by its name as a choice of schedule.decay."""
    DECAYS[function.__name__] = function
    return function


@decay
def step(schedule: "ScheduleConfig", step: float, steps: int) -> float:
    """Constant, times decay_factor from decay_at on, and once more at each of decay_also_at."""
    drops = sum(step >= round(at * steps) for at in (schedule.decay_at, *schedule.decay_also_at))
    return schedule.decay_factor**drops


@decay
def cosine(schedule: "ScheduleConfig", step: float, steps: int) -> float:
    """Half a cosine, from 1 to 0 at the end."""
    return (1 + math.cos(math.pi * step / steps)) / 2


@decay
def exponential(schedule: "ScheduleConfig", step: float, steps: int) -> float:
    """Falls in every step, to decay_factor at decay_at, and goes on at that rate."""
    return float(schedule.decay_factor ** (step / (schedule.decay_at * steps)))


def learning_rate(schedule: "ScheduleConfig", step: int, steps: int, images: int | None = None) -> float:
    """The head's learning rate in step number `step` of `steps`, counted from 0.

    images: the number of training images. Without it, decay_per_epoch has no effect.
    """
    warm = schedule.warmup * steps
    rise = min(1.0, (step + 1) / warm) if warm else 1.0
    fallen: float = step
    if schedule.decay_per_epoch and images is not None:
        fallen = step * schedule.batch_size // images * images / schedule.batch_size  # where this pass began
    return rise * schedule.lr * DECAYS[schedule.decay](schedule, fallen, steps)


def automatic_length(images: int, batch_size: int) -> tuple[int, int]:
    """Iterations and batch size of schedule.iterations=auto for a number of training images.

    `batch_size` is halved until a batch takes at most half of the images, but not below 2, which BatchNorm needs. The
    length is about 30 passes over the images: at least 300 iterations, since a new head is not trained with fewer, and
    at most the paper's 9,000.
    """
    while batch_size > max(2, images // 2):
        batch_size //= 2
    return min(max(round(30 * images / batch_size), 300), 9000), batch_size


@dataclass
class ScheduleConfig(Options):
    key: ClassVar[str] = "schedule"

    # OmegaConf cannot merge int | str.
    iterations: Any = option(
        None, "optimizer steps; auto chooses them, and the batch size, from the number of training images"
    )
    epochs: float | None = option(
        None, "passes over the training images; replaces schedule.iterations", above=0, at_most=LONGEST
    )
    batch_size: int = option(64, "images per optimizer step", above=0, at_most=LARGEST_BATCH)
    accumulate: int = option(
        1, "micro-batches that a batch is cut into: less memory, the same gradient except for BatchNorm", above=0
    )
    lr: float = option(0.01, "learning rate of the head", above=0)
    backbone_lr_factor: float = option(1.0, "learning rate of the backbone as a multiple of the head's", above=0)
    warmup: float = option(0.0, "fraction of the steps in which the learning rate rises linearly", at_least=0, below=1)
    decay: str = option("step", "how the learning rate falls: step, cosine or exponential", choices=list(DECAYS))
    decay_at: float = option(2 / 3, "fraction of the steps after which the learning rate falls", above=0, at_most=1)
    decay_also_at: list[float] = option([], "later fractions of the steps after which it falls once more", at_most=1)
    decay_factor: float = option(0.1, "factor on the learning rate when it falls", above=0)
    decay_per_epoch: bool = option(
        False, "the learning rate falls after each pass over the training images, and not in each step"
    )
    layer_decay: float = option(
        1.0, "factor on the learning rate for each depth of the backbone below the head", above=0, at_most=1
    )
    clip_norm: float | None = option(None, "largest norm of the whole gradient; null: any", above=0)
    label_smoothing: float = option(
        0.0, "fraction of each label that is spread over all classes in training", at_least=0, below=1
    )
    class_weights: str = option(
        "none",
        "none: every training image counts the same; balanced: every class counts the same",
        choices=("none", "balanced"),
    )
    aspect: str = option(
        "squash",
        "squash: images become backbone.resize x backbone.resize; keep: their shorter side becomes backbone.resize",
        choices=("squash", "keep"),
    )
    train_crop: str = option(
        "random",
        "random: a crop of backbone.image_size pixels; random_resized: a random box, resized to that",
        choices=("random", "random_resized"),
    )
    min_crop_area: float = option(
        0.2, "smallest fraction of the image's area in a random_resized crop", above=0, at_most=1
    )
    pad: int = option(
        0, "pixels of black around training images, which random crops may include", at_least=0, at_most=LARGEST_SIDE
    )
    brightness: float = option(
        0.0, "largest random shift of a training image's brightness, as a fraction of the whole range", at_least=0
    )
    saturation: float = option(
        0.0,
        "s: a training image's saturation is multiplied by a random number in 1 - s .. 1 + s",
        at_least=0,
        at_most=1,
    )
    contrast: float = option(
        0.0, "c: a training image's contrast is multiplied by a random number in 1 - c .. 1 + c", at_least=0, at_most=1
    )
    test_image: str = option(
        "crop",
        "crop: test images are cropped (test_crops); whole: the whole stored image becomes backbone.image_size",
        choices=("crop", "whole"),
    )
    test_crops: int = option(
        1, "1: the centre crop; 10: corners and centre, also mirrored, whose mean logits count", choices=(1, 10)
    )
    log_every: int = option(10, "iterations between two lines of metrics", above=0, identity=False)
    eval_every: int = option(
        0, "iterations between evaluations on test or validation images; 0: at the end only", at_least=0, identity=False
    )
    eval_epochs: float | None = option(
        None, "passes over the training images between evaluations; replaces schedule.eval_every", above=0
    )
    checkpoint_seconds: float = option(
        60.0, "seconds between checkpoints; more if one takes over 1 % of that", above=0, identity=False
    )

    def check(self) -> None:
        self.require(
            self.iterations is not None or self.epochs is not None,
            "iterations",
            "schedule needs a length: set schedule.iterations or schedule.epochs.",
        )
        if self.epochs is not None:
            self.iterations = None
        self.require(
            self.iterations in (None, "auto") or (type(self.iterations) is int and 0 < self.iterations <= LONGEST),
            "iterations",
            f"schedule.iterations must be auto or a whole number in 1..{LONGEST:,}, got {self.iterations!r}.",
        )
        self.require(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            f"schedule.batch_size={self.batch_size} cannot be divided by schedule.accumulate={self.accumulate}.",
        )
        self.require(
            all(self.decay_at <= at for at in self.decay_also_at),
            "decay_also_at",
            f"schedule.decay_also_at must be in [schedule.decay_at, 1], got {self.decay_also_at}.",
        )
        self.require(
            self.test_image == "crop" or self.test_crops == 1,
            "test_image",
            f"schedule.test_image=whole leaves no crops: set schedule.test_crops=1, not {self.test_crops}.",
        )
        self.require(
            self.pad == 0 or self.train_crop == "random",
            "pad",
            f"schedule.pad={self.pad} belongs to schedule.train_crop=random, not to {self.train_crop}.",
        )

    def fitted_to(self, images: int) -> "ScheduleConfig":
        """The same with numbers in the place of `auto`. images: of the training split, held-out ones included.

        Runs on folds therefore have the length and the batch size of the final ones, which alpha depends on.
        """
        if self.iterations != "auto":
            return self
        iterations, batch_size = automatic_length(images, self.batch_size)
        return self.replace(iterations=iterations, batch_size=batch_size)

    def length(self, n_train: int) -> int:
        """Number of iterations of a run on `n_train` images. The schedule must not be `auto` any more."""
        if self.epochs is None:
            return int(self.iterations)
        return max(1, round(self.epochs * n_train / self.batch_size))

    def evaluation_interval(self, n_train: int) -> int:
        """Iterations between two evaluations in a run on `n_train` images; 0: at the end only."""
        if self.eval_epochs is None:
            return self.eval_every
        return max(1, round(self.eval_epochs * n_train / self.batch_size))


# --- Optimizers ---


@dataclass
class OptimizerConfig(Options):
    """Options of every optimizer. The schedule has the learning rate, and the method has the weight decay."""

    key: ClassVar[str] = "optimizer"

    name: str = option(help="name of the optimizer")
    decay_vectors: bool = option(
        True, "whether weight decay covers parameters of one dimension: biases, and scales of normalisation layers"
    )


@dataclass
class SGDConfig(OptimizerConfig):
    name: str = option("sgd", "name of the optimizer")
    momentum: float = option(0.9, "fraction of the last step that is added to the next", at_least=0, below=1)
    nesterov: bool = option(False, "Nesterov's form of momentum")

    def check(self) -> None:
        self.require(
            not self.nesterov or self.momentum > 0,
            "nesterov",
            "optimizer.nesterov needs an optimizer.momentum above 0.",
        )


@dataclass
class AdamWConfig(OptimizerConfig):
    name: str = option("adamw", "name of the optimizer")
    beta1: float = option(0.9, "decay rate of the mean gradient", at_least=0, below=1)
    beta2: float = option(0.999, "decay rate of the mean squared gradient", at_least=0, below=1)
    eps: float = option(1e-8, "added to the root of the mean squared gradient", above=0)


@dataclass
class AdamConfig(AdamWConfig):
    name: str = option("adam", "name of the optimizer")


Groups = list[dict[str, Any]]  # of parameters
Make = Callable[[Groups, Any, float, float], torch.optim.Optimizer]  # of groups, options, lr and weight decay
OPTIMIZERS: Registry[Make] = Registry("optimizer.name")


@OPTIMIZERS.register("sgd", "SGD", SGDConfig)
def sgd(groups: Groups, config: SGDConfig, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """v <- mu v + (g + wd theta), theta <- theta - lr v; mu is the momentum."""
    return torch.optim.SGD(groups, lr, config.momentum, 0, weight_decay, config.nesterov, fused=True)


@OPTIMIZERS.register("adamw", "AdamW", AdamWConfig)
def adamw(groups: Groups, config: AdamWConfig, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam with weight decay that is decoupled from the gradient (Loshchilov, Hutter, ICLR 2019)."""
    return torch.optim.AdamW(groups, lr, (config.beta1, config.beta2), config.eps, weight_decay, fused=True)


@OPTIMIZERS.register("adam", "Adam", AdamConfig)
def adam(groups: Groups, config: AdamConfig, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Adam with weight decay that is a part of the gradient (Kingma, Ba, ICLR 2015)."""
    return torch.optim.Adam(groups, lr, (config.beta1, config.beta2), config.eps, weight_decay, fused=True)


def make_optimizer(
    target: Network, method: Regularizer, config: OptimizerConfig, schedule: ScheduleConfig
) -> torch.optim.Optimizer:
    """The optimizer over everything that the method trains.

    These are the head, the method's own parameters, and the backbone's parameters that the method trains. Each group
    has an `lr_factor`, by which the loop multiplies the schedule's learning rate. In the backbone it is
    schedule.backbone_lr_factor * schedule.layer_decay^distance, the distance from the head (`depths_below_head`).
    """
    if method.needs.frozen_backbone:
        target.freeze()
        for parameter in target.head_parameters().values():
            parameter.requires_grad_(True)
    slowly: dict[nn.Parameter, None] = dict.fromkeys(method.trained_slowly())
    groups: Groups = [
        {"params": list(target.head_parameters().values()), "lr_factor": 1.0},
        *_by_depth(target, method, schedule),
        {"params": [p for p in method.trained() if p not in slowly], "lr_factor": 1.0},
        {"params": list(slowly), "lr_factor": schedule.backbone_lr_factor},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    if not config.decay_vectors:
        groups = [part for group in groups for part in _without_decay_of_vectors(group)]
    make = OPTIMIZERS[config.name].thing
    return make([group for group in groups if group["params"]], config, schedule.lr, method.weight_decay)


def _by_depth(target: Network, method: Regularizer, schedule: ScheduleConfig) -> Groups:
    """The trained parameters of the backbone, from the stem on: one group without schedule.layer_decay."""
    depths = depths_below_head(target.model, target.is_head) if schedule.layer_decay < 1 else {}
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in method.trained_in_backbone(target).items():
        groups.setdefault(depths.get(name, 0), []).append(parameter)
    factor = schedule.backbone_lr_factor
    return [{"params": group, "lr_factor": factor * schedule.layer_decay**depth} for depth, group in groups.items()]


def _without_decay_of_vectors(group: dict[str, Any]) -> Groups:
    matrices = [p for p in group["params"] if p.dim() > 1]
    vectors = [p for p in group["params"] if p.dim() <= 1]
    return [group | {"params": matrices}, group | {"params": vectors, "weight_decay": 0.0}]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the head's learning rate, and with it that of every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # a CUDA graph reads it there
            group["lr"].fill_(lr * group["lr_factor"])
        else:
            group["lr"] = lr * group["lr_factor"]

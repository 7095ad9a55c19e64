"""The options of a run: its four choices (dataset, backbone, reg, schedule), and what is built from them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.console import log, log_once, shorten_list
from ..common.options import MISSING, Options, Registry, describe, from_mapping, option, require
from ..data.dataset import Dataset, Splits, counts_of, expected_counts
from ..data.examination import LEAKS, only_first_pictures
from ..data.options import DatasetConfig, EvaluateConfig, SplitConfig
from ..data.registry import READERS
from ..methods import METHODS, method_config
from ..methods.base import MapShapes, OutputShapes, Regularizer, Stage
from ..models import ArcFaceConfig, Network, frozen_maps
from ..models.sources import SourceConfig, SourceNetwork, frozen, shapes_of
from ..models.zoo import BackboneConfig, GraphBackboneConfig, options_of_backbone, untrained
from ..records.identity import run_id, run_identity
from . import averages, devices, graph_tasks, verification  # noqa: F401 - averages and tasks register themselves
from .callbacks import AVERAGES, AverageConfig
from .loop import Step, train_step
from .optimizers import OPTIMIZERS, OptimizerConfig, ScheduleConfig
from .tasks import TASKS

REGISTRIES: dict[str, Registry[Any]] = {  # by the group that chooses an entry
    "dataset": READERS,
    "reg": METHODS,
    "optimizer": OPTIMIZERS,
    "average": AVERAGES,
}


@dataclass
class RunConfig(Options):
    dataset: DatasetConfig = MISSING
    backbone: BackboneConfig = MISSING
    # A MethodConfig. OmegaConf keeps a sum's terms only in a field of any type.
    reg: Any = option(help="the method and its options")
    schedule: ScheduleConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    average: AverageConfig = field(default_factory=AverageConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    arcface: ArcFaceConfig = field(default_factory=ArcFaceConfig)
    task: str = option("classification", "what the test images measure; the data set brings it", choices=list(TASKS))
    # Entries of the command line, which cli/ resolves to a list of SourceConfig.
    source: Any = option(None, "networks to learn from; null: the one that backbone.weights names")
    seed: int = option(0, "seed of the head, the order of the images, their crops and the method's draws", at_least=0)
    device: str = option("auto", "where the run computes", choices=("auto", "cpu", "cuda"), identity=False)
    precision: str = option(
        "auto",
        "arithmetic of the training; auto: bf16 on a GPU that has it, else fp32. Evaluation is always in fp32",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool = option(False, "compile the networks with torch.compile")
    cuda_graph: bool = option(False, "on a GPU, replay the whole training step as one CUDA graph (not measured yet)")
    deterministic: bool = option(False, "use deterministic algorithms only")
    data_dir: str = option("data", "folder that holds the data sets' own folders", identity=False)
    results_dir: str = option("results", "folder for the runs' records", identity=False)
    cache_dir: str = option("results/cache", "folder for image stores and channel attention", identity=False)
    logging: str = option(
        "none", "where metrics are shown beside metrics.jsonl", choices=("none", "tensorboard"), identity=False
    )
    model_card: bool = option(
        False, "describe the trained network, so that source=.../model.safetensors accepts it", identity=False
    )
    dry_run: bool = option(False, "say what is finished, missing and not ready; run nothing", identity=False)
    retry_failed: bool = option(False, "repeat runs that failed before", identity=False)

    @property
    def resizing(self) -> str:
        """How images become those of the store (data.store.open_store)."""
        bicubic = self.backbone.interpolation == "bicubic"
        return f"{self.schedule.aspect}-bicubic" if bicubic else self.schedule.aspect

    def check(self) -> None:
        pad, side = self.schedule.pad, self.backbone.image_size
        self.require(
            pad < side or not side,  # 0: a network by name has no size before `complete`
            "schedule.pad",
            f"schedule.pad ({pad}) must be less than backbone.image_size ({side}).",
        )
        self.require(
            self.task == self.dataset.task,
            "task",
            f"task={self.task}: dataset={self.dataset.name} is for task={self.dataset.task}.",
        )
        TASKS[self.task].check(self)
        self.require(
            not self.average.chooses or self.schedule.eval_epochs is not None,
            "average.name",
            f"average={self.average.name} chooses among evaluations: set schedule.eval_epochs, such as 1.",
        )
        for key, registry in (("optimizer", OPTIMIZERS), ("average", AVERAGES)):
            options = getattr(self, key)
            named: type[Options] = registry[options.name].options
            self.require(
                isinstance(options, named),
                f"{key}.name",
                f"{key}.name={options.name} has other options: choose it by {key}={options.name}.",
            )
        self.require(
            not self.average.on_validation
            or self.dataset.own_validation
            or self.split.folds is not None
            or self.split.val_fraction > 0,
            "average",
            f"average={self.average.name} chooses on validation images: set split.val_fraction=0.2, or split.folds.",
        )


# --- Keys ---


@cache
def kinds_of_keys() -> dict[str, set[str]]:
    """The types of each key in any choice of its group. A sum's terms have the keys of reg."""
    groups: list[tuple[str, type[Options]]] = [
        ("", RunConfig),
        ("backbone.", BackboneConfig),
        ("backbone.", GraphBackboneConfig),
    ]
    groups += [(f"{key}.", entry.options) for key, known in REGISTRIES.items() for entry in known.entries.values()]
    kinds: dict[str, set[str]] = {"source": {"text"}}
    for prefix, group in groups:
        for one in describe(group):
            kinds.setdefault(f"{prefix}{one.name}", set()).add("text" if one.is_text else one.in_words)
    return kinds


def takes(key: str) -> set[str]:
    return kinds_of_keys().get(re.sub(r"reg\.terms\.[^.]+\.", "reg.", key), set())


def takes_list(key: str) -> bool:
    return any(kind.startswith("a list") for kind in takes(key))


def run_config_from(values: Mapping[str, Any]) -> RunConfig:
    """The checked configuration of plain data, such as a record's `config`. Raises OptionError."""
    groups: dict[str, type[Options]] = {
        "dataset": READERS[values["dataset"]["reader"]].options,
        "backbone": options_of_backbone(values["backbone"]["name"]),
        "optimizer": OPTIMIZERS[values["optimizer"]["name"]].options,
    }
    if "average" in values:  # a record from before this group has its default
        groups["average"] = AVERAGES[values["average"]["name"]].options
    made: dict[str, Any] = {name: from_mapping(group, values[name]) for name, group in groups.items()}
    probe = values.get("evaluate", {}).get("probe")
    if isinstance(probe, Mapping):
        made["evaluate"] = from_mapping(EvaluateConfig, values["evaluate"])
        made["evaluate"].probe = from_mapping(READERS[probe["reader"]].options, probe)
    made["reg"] = method_config(values["reg"])
    if values.get("source") is not None:
        made["source"] = [from_mapping(SourceConfig, entry) for entry in values["source"]]
    return from_mapping(RunConfig, {**values, **made})


# --- What a configuration describes ---


def new_target(source: Network, config: RunConfig, classes: int) -> Network:
    """The network that a run trains, before the first step: the source with a new head."""
    return source.with_new_head(classes, config.seed, TASKS[config.task].head(config))


def frozen_source(
    config: RunConfig,
    stage: Stage,
    source: Network,
    sources: list[SourceNetwork] | None,
    previous: Network | None,
    device: torch.device,
) -> nn.Module | None:
    """The frozen network that a stage learns from, at the least cost: its maps, and its logits where they are needed.

    It is None for a method that needs no source.
    source: the network that the target starts from. sources: networks to learn from in its place. previous: the target
    at the end of the previous stage.
    """
    with_logits, precision = stage.method.needs.source_logits, config.precision
    if not stage.method.needs.source:
        return None
    if previous is not None and stage.alignment_target == "previous":
        return frozen_maps(previous, with_logits, precision)
    if sources is None:
        return frozen_maps(source, with_logits, precision)
    return frozen(sources, config.backbone, with_logits, precision).to(device)


def step_of(config: RunConfig, method: Regularizer, device: torch.device) -> Step:
    """The function that makes a training step."""
    if not config.cuda_graph:
        return train_step
    from .graphed_step import graphed  # other runs do without it

    return graphed(method, device)


def source_shapes(
    config: RunConfig, method: Regularizer, source: Network, sources: list[SourceNetwork] | None, shapes: MapShapes
) -> OutputShapes | None:
    """Shapes of the frozen source's outputs; None if they are those of the target's maps, `shapes`."""
    with_logits = method.needs.source_logits
    if sources is None:
        return {**shapes, "logits": (source.classes,)} if with_logits else None
    return shapes_of(sources, 1, config.backbone.image_size, with_logits)


def seed_of_modules(seed: int, stage: int) -> int:
    """Seed of the modules that a method makes. It differs between stages."""
    return int(np.random.default_rng((seed, stage)).integers(2**32)) if stage else seed


def weights_name(config: RunConfig, weights: str) -> str:
    """The source weights' entry in an identity: their fingerprint, or none for random weights.

    Random weights differ with the seed, but are one choice.
    """
    return "none" if config.backbone.weights == "none" else weights


def name_of(
    config: RunConfig, data: str, weights: str, sources: list[SourceNetwork] | None = None
) -> tuple[str, dict[str, Any]]:
    """The run's name and identity. data, weights: fingerprints of the data set and of the source's weights."""
    identities = None if sources is None else [source.identity for source in sources]
    identity = run_identity(config, data, weights_name(config, weights), identities)
    if config.precision != "fp32":  # version 1 measured such a run in bf16, version 2 measures every run in fp32
        identity["evaluation"] = {"version": 2}
    identity["dataset"]["name"] = config.dataset.identity_name
    return run_id(config.dataset.name, config.backbone.name, config.reg.name, config.seed, identity), identity


def say_what_it_trains(name: str, config: RunConfig, dataset: Dataset, splits: Splits, stages: int) -> None:
    """Logs what the run trains on and how long, and what may surprise: incomplete data, stages, accumulation."""
    schedule, task = config.schedule, TASKS[config.task]
    counts, official = counts_of(dataset), expected_counts(config.dataset)
    if official is not None and counts.against(official) != "ready":
        log_once(
            f"{dataset.name}: {counts.train:,} training and {counts.test:,} test {task.inputs}, "
            f"{'classes' if task.one_label else 'properties'}: {counts.classes:,}; officially {official.train:,}, "
            f"{official.test:,}, {official.classes:,}"
        )
    conflicts, leaks = dataset.copies()
    for what, pairs in (("label conflicts, one image with two labels", conflicts), (LEAKS, leaks)):
        if pairs:
            words = shorten_list([f"{one} = {other}" for one, other in pairs])
            log_once(f"{dataset.name}: {what}: {len(pairs):,} ({words})")
    if several := dataset.of_several_pictures():
        log_once(f"{dataset.name}: {only_first_pictures(several)}")
    images = f"{len(splits.train):,} training"
    images += f", {len(splits.val):,} validation" if len(splits.val) else ""
    images += f", {len(splits.test):,} test" if config.split.measures_test else ""
    fold = ""
    if config.split.folds:  # runs of a choice differ by these
        alpha = getattr(config.reg, "alpha", None)
        fold = f"fold {config.split.fold} of {config.split.folds}, " + (
            f"alpha={alpha:g}, " if alpha is not None else ""
        )
    targets = "of {} classes" if task.one_label else f"with {{}} label{'s' if len(dataset.classes) > 1 else ''}"
    log.info(
        f"{name}: {fold}{images} {task.inputs} {targets.format(f'{len(dataset.classes):,}')} "
        f"({shorten_list(dataset.classes, 3)}); "
        f"{schedule.length(len(splits.train)):,} iterations of {schedule.batch_size} {task.in_words(config)}"
    )
    if stages > 1:
        log.info(f"{name}: {stages} stages of {schedule.length(len(splits.train)):,} iterations")
    if schedule.accumulate > 1:
        count = f"{schedule.batch_size // schedule.accumulate} {task.inputs}"
        log_once(
            f"schedule.accumulate={schedule.accumulate}: a micro-batch has {count}, and a step takes the gradient of "
            f"all {schedule.batch_size}. BatchNorm in training takes its statistics from the {count}, and dropout "
            "draws anew for each micro-batch; nothing else differs from a run with whole batches."
        )


# --- What is refused before any data are read ---


def check_choices(config: RunConfig, stages: Sequence[Stage]) -> None:
    """Raises UserError if the four choices do not go together."""
    require(
        config.logging == "none" or find_spec("tensorboard") is not None,
        "logging=tensorboard needs the package tensorboard: pip install 'delta-transfer[tensorboard]'",
    )
    reg, methods, task = f"reg={config.reg.name}", [stage.method for stage in stages], TASKS[config.task]
    model = untrained(config.backbone)
    require(
        task.inputs == "images" or (devices.processes() == 1 and config.source is None),
        f"task={task.name} runs in one process (without torchrun), and from its own source (source=null).",
    )
    for method in methods:
        for part in (method, *method.parts_to_fit()):
            part.sample_loss = task.sample_loss
        require(
            task.inputs == "images" or not method.needs.images,
            f"{reg} compares maps with a height and a width: it needs images, and task={task.name} has {task.inputs}.",
        )
        require(
            task.one_label or not method.needs.one_label,
            f"{reg} needs one label of K classes for each input, which task={task.name} does not have.",
        )
        method.requires(model, config.optimizer.name, devices.processes())
    require(
        bool(config.backbone.taps) or not any(method.needs.taps for method in methods),
        f"{reg} compares feature maps, but backbone.taps is empty.",
    )
    require(
        not config.average.trained_backbone or not any(method.needs.frozen_backbone for method in methods),
        f"average={config.average.name} would do nothing: {reg} freezes the backbone.",
    )
    plain_steps = config.schedule.clip_norm is None and config.optimizer.decay_vectors
    require(
        plain_steps or not any(method.needs.same_steps for method in methods),
        f"{reg} looks ahead by steps without clipping and with one weight decay: set schedule.clip_norm=null "
        "optimizer.decay_vectors=true.",
    )
    require(
        config.source is None or all(method.needs.other_sources for method in methods),
        f"{reg} starts at its source network, which is backbone.weights: it takes no other (source=null).",
    )
    require(
        config.backbone.weights == "none" or not any(method.needs.random_start for method in methods),
        f"{reg} begins with random weights, not with {config.backbone.weights}: set backbone.weights=none.",
    )
    # Other methods start from the source, so that a random one hides nothing.
    learning = any(method.needs.source and method.needs.other_sources for method in methods)
    require(
        config.source is not None or config.backbone.weights != "none" or not learning,
        f"{reg} learns from a source network, but backbone.weights=none is a random one: name a source, such as "
        "source=resnet34 or a file that delta-pretrain wrote.",
    )
    if config.source is not None and config.backbone.weights != "none":
        log_once(
            f"The target starts from the weights {config.backbone.weights}. The published targets of methods with a "
            "source= start at random (backbone.weights=none), and their taps are behind a ReLU (backbone.taps)."
        )
    if task.inputs == "images" and config.schedule.test_image == "crop":
        say_what_is_cropped(config.backbone.image_size, config.backbone.resize)


def say_what_is_cropped(size: int, resize: int) -> None:
    """Says that test crops of `size` pixels show only a small part of images of `resize` pixels, if so."""
    if resize > 1.5 * size:
        fitting = round(size * 256 / 224)
        log_once(
            f"The network sees the middle {size} x {size} pixels of test images of {resize} pixels, which is at most "
            f"{100 * (size / resize) ** 2:.0f} % of them. backbone.resize={fitting} shows nearly all."
        )


def user_of_source_head(config: RunConfig, stages: Sequence[Stage]) -> str | None:
    """The setting that needs a trained head in backbone.weights; None if none does."""
    if config.source is None and any(stage.method.needs.source_head for stage in stages):
        return f"reg={config.reg.name}"
    return "evaluate.forgetting=true" if config.evaluate.forgetting else None


def check_micro_batches(config: RunConfig, stages: Sequence[Stage]) -> int:
    """Images per micro-batch. Raises UserError if a batch cannot be cut into micro-batches of equal size."""
    schedule, processes = config.schedule, devices.processes()
    count = processes * schedule.accumulate
    for stage in stages:
        stage.method.loss_scale = count
    accumulate = f" and schedule.accumulate={schedule.accumulate}" if schedule.accumulate > 1 else ""
    require(
        schedule.batch_size % count == 0,
        f"schedule.batch_size={schedule.batch_size} cannot be divided by {processes} processes{accumulate}.",
    )
    return schedule.batch_size // count

"""One run, from its configuration to its record. The headings are those of a paper's method section."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from ..common import interrupts
from ..common.console import Display, log
from ..common.hardware import peak_memory
from ..common.options import require
from ..data import load_dataset
from ..data.dataset import make_splits
from ..engine import devices
from ..engine.assemble import frozen_source, new_target, open_loader, seed_of_modules, source_shapes
from ..engine.callbacks import Checkpoints, OnLine, live_view, require_live_view
from ..engine.config import RunConfig
from ..engine.evaluation import Evaluator
from ..engine.loop import TrainState, train
from ..engine.optimizers import make_optimizer
from ..methods import build_method
from ..methods.base import Stage
from ..models import ArcFaceLoss
from ..models.sources import load_sources
from ..models.zoo import build_source, untrained
from ..records.checked import fingerprint
from ..records.run_directory import RunDirectory, timestamp
from .failures import failures_recorded
from .fitting import fit_method
from .recording import RunResult, describe, describe_aloud, finished_before, name_of, write_outputs
from .stages import StageRunner


def run(config: RunConfig, overrides: Sequence[str] = ()) -> RunResult:
    """Carries out the run that `config` describes, or finds it finished.

    overrides: the words that `config` was composed from, for the record.

    Raises UserError, InUse and OSError before there is a run, or where the same command can go on with it. Whatever
    else ends a run is recorded in its summary and raised as RunFailed.
    """
    device = devices.set_up(config.device, config.deterministic)
    config.precision = devices.pick_precision(config.precision, device)
    stages = build_method(config.reg).stages()
    check_choices(config, stages)
    tapped = any(stage.method.needs.taps for stage in stages)

    # --- Data ---

    with devices.rank0_first():  # it reads all images and remembers their digests for the others
        dataset = load_dataset(config.dataset, Path(config.cache_dir))
        data = dataset.fingerprint
    splits = make_splits(dataset, config.dataset, config.split)
    config.schedule = config.schedule.fitted_to(splits.for_training)
    micro_batch = check_micro_batches(config, stages)

    # --- Source and target ---

    with devices.rank0_first():  # it may download
        source = build_source(config.backbone, config.seed, tapped=tapped)
        sources = load_sources(config.source, tapped) if config.source else None
    weights = fingerprint(source.weights())
    name, identity = name_of(config, data, weights, sources)
    directory = RunDirectory(Path(config.results_dir) / "runs" / name, writes=devices.rank() == 0)
    before = devices.broadcast_from_rank0(directory.summary)
    if (finished := finished_before(name, before, config.retry_failed)) is not None:
        return finished
    trains_backbone = any(not stage.method.needs.frozen_backbone for stage in stages)
    shapes = source.map_shapes(micro_batch, config.backbone.image_size, training=trains_backbone)
    for other in sources or ():  # a network that does not fit is found here, before there is a run
        other.network.map_shapes(1, config.backbone.image_size, training=False)
    describe_aloud(name, config, dataset, splits)
    loader = open_loader(config, dataset, device)
    with directory:
        meanwhile = devices.broadcast_from_rank0(directory.summary)
        if meanwhile is not None and meanwhile != before and (finished := finished_before(name, meanwhile, False)):
            return finished
        directory.start_anew(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
        summary = describe(config, name, identity, dataset, splits, weights, sources, device)
        summary["overrides"] = list(overrides)
        for network in (source, *(other.network for other in sources or ())):
            network.to(device).to(memory_format=torch.channels_last).freeze()
        untrained_target = partial(new_target, source, config, len(dataset.classes))
        length = config.schedule.length(len(splits.train))
        runner = StageRunner(stages, length, directory, device, untrained_target)
        summary["iterations"] = runner.iterations
        evaluator = Evaluator(loader, splits, dataset.pairs, config.precision, config.split.measures_test)
        with failures_recorded(summary, config, directory, runner, loader, splits.train):
            for stage in runner:  # one, but for methods such as AFA
                # --- Fitting the method ---

                method = stage.method
                target = runner.previous.copy() if runner.previous else untrained_target()
                target.requires_grad_(True)
                devices.synchronise_batchnorm(target.traced, device)
                summary["fit"] = summary["fit"] | fit_method(
                    method, source, weights, config, dataset, splits, loader, directory
                )
                with torch.random.fork_rng(devices=[]):  # for modules that the method makes
                    torch.manual_seed(seed_of_modules(config.seed, runner.index))
                    method.setup(target, shapes, source_shapes(config, method, source, sources, shapes))
                method.to(device)

                # --- Optimizer and schedule ---

                optimizer = make_optimizer(target, method, config.optimizer, config.schedule)
                state = TrainState(
                    target,
                    frozen_source(config, stage, source, sources, runner.previous, device)
                    if method.needs.source
                    else None,
                    optimizer,
                    config.precision,
                    config.backbone.aux_weight,
                    config.compile,
                    config.schedule.accumulate,
                    ArcFaceLoss(**vars(config.arcface)) if config.task == "verification" else F.cross_entropy,
                )

                # --- Training ---

                progress = runner.begin(state)
                with (
                    Display(name, runner.iterations) as display,
                    live_view(config.logging, directory, progress.iterations_done) as show,
                    interrupts.deferred(),
                ):
                    display.start_at(progress.iterations_done)
                    seconds = train(
                        state,
                        method,
                        loader,
                        splits.train,
                        config.schedule,
                        progress,
                        [
                            *(OnLine(function) for function in (directory.append_metrics, display.metrics, show)),
                            Checkpoints(config.schedule.checkpoint_seconds, runner.save),
                        ],
                        lr_factor=stage.lr_factor,
                        labels={"stage": runner.index + 1} if len(stages) > 1 else {},
                        evaluate=partial(evaluator, target),
                    )
                runner.end(seconds, evaluator.scalars())

            # --- Evaluation: the last iteration counts, nothing is selected ---

            measured = evaluator.scalars() | {
                "train_seconds": runner.seconds,
                "images_per_second": runner.iterations * config.schedule.batch_size / runner.seconds,
            }

            # --- Record ---

            summary |= measured | runner.record()
            summary |= {"peak_memory_bytes": peak_memory(device), "finished": timestamp()}
            test_outputs = evaluator.latest.get("test")
            write_outputs(config, directory, target, runner.modules, dataset, splits, test_outputs, summary)
            directory.write_summary(summary)
        directory.remove_checkpoint()
    result = RunResult(summary, skipped=False)
    log.info(f"{name}: {result}, {summary['train_seconds']:.0f} s")
    return result


# --- What is refused before any data are read ---


def check_choices(config: RunConfig, stages: Sequence[Stage]) -> None:
    """Raises UserError if the four choices do not go together."""
    require_live_view(config.logging)
    reg, methods = f"reg={config.reg.name}", [stage.method for stage in stages]
    model = untrained(config.backbone.name)
    for method in methods:
        method.requires(model, config.optimizer.name, devices.processes())
    require(
        bool(config.backbone.taps) or not any(method.needs.taps for method in methods),
        f"{reg} compares feature maps, but backbone.taps is empty.",
    )
    require(
        config.source is None or all(method.needs.other_sources for method in methods),
        f"{reg} starts at its source network, which is backbone.weights: it takes no other (source=null).",
    )
    # Other methods start from the source: for them a random one is at least honest.
    learning = any(method.needs.source and method.needs.other_sources for method in methods)
    require(
        config.source is not None or config.backbone.weights != "none" or not learning,
        f"{reg} learns from a source network, but backbone.weights=none is a random one: name a source, e.g. "
        "source=resnet34 or a file of delta-pretrain's.",
    )
    if config.source is not None and config.backbone.weights != "none":
        log.info(
            f"The target starts from weights of its own, {config.backbone.weights}. The published targets of methods "
            "with a source= start at random (backbone.weights=none), and their taps are behind a ReLU (backbone.taps)."
        )


def check_micro_batches(config: RunConfig, stages: Sequence[Stage]) -> int:
    """Images of a micro-batch. Raises UserError if a batch cannot be cut into micro-batches of equal size."""
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

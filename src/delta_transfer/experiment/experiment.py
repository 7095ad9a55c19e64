"""One run, from its configuration to its record. The headings are those of a paper's method section."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ..common.console import Display, log
from ..common.errors import RunFailed, UserError
from ..data import load_once
from ..data.dataset import Dataset, Splits, make_splits
from ..data.loader import BatchSource
from ..data.registry import READERS
from ..engine import devices
from ..engine.callbacks import AVERAGES, Checkpoints, OnLine, StageRunner
from ..engine.config import (
    RunConfig,
    check_choices,
    check_micro_batches,
    frozen_source,
    name_of,
    new_target,
    say_what_it_trains,
    seed_of_modules,
    source_shapes,
    step_of,
    user_of_source_head,
    weights_name,
)
from ..engine.kept import FurtherSets
from ..engine.loop import TrainState, train
from ..engine.optimizers import make_optimizer
from ..engine.tasks import TASKS, Evaluator, NotFinite, class_weights
from ..models.sources import SourceNetwork, load_sources
from ..models.zoo import build_source, not_downloaded, read_weights
from ..records.arrays import PREDICTIONS, VALIDATION, predictions
from ..records.checked import fingerprint
from ..records.files import make_output_folder
from ..records.locks import InUse
from ..records.metrics import show_progress
from ..records.outputs import write_outputs
from ..records.run_directory import SCHEMA, RunDirectory, RunResult, finished_before, git_commit, live_view, timestamp
from .failures import explain
from .fitting import fit_part


def run(config: RunConfig, overrides: Sequence[str] = (), datasets: dict[str, Dataset] | None = None) -> RunResult:
    """Carries out the run that `config` describes, or finds it finished.

    overrides: the words that `config` was composed from, for the record. datasets: those that a command has read.

    Raises UserError, InUse and OSError before there is a run, or where the same command can go on with it. Every other
    end of a run is recorded in its summary and raised as RunFailed.
    """
    device = devices.set_up(config.device, config.deterministic)
    config.precision = devices.pick_precision(config.precision, device)
    task, stages = TASKS[config.task], config.reg.build().stages()
    check_choices(config, stages)
    if config.schedule.iterations != "auto":  # that also chooses the batch size
        check_micro_batches(config, stages)
    tapped = any(stage.method.needs.taps for stage in stages)

    # --- Data ---

    datasets = {} if datasets is None else datasets
    with devices.rank0_first():  # it downloads weights and reads all images, whose digests it remembers for the others
        for folder in (config.results_dir, config.cache_dir):
            make_output_folder(Path(folder))
        dataset = load_once(config.dataset, Path(config.cache_dir), datasets)
        if not_downloaded(config.backbone):  # before all images are read: it may fail
            read_weights(config.backbone)
        data = dataset.fingerprint
    splits = make_splits(dataset, config.dataset, config.split, config.seed)
    config.schedule = config.schedule.fitted_to(splits.for_training)
    micro_batch = check_micro_batches(config, stages)

    # --- Source and target ---

    source = build_source(config.backbone, config.seed, tapped, user_of_source_head(config, stages))
    with devices.rank0_first():  # it may download
        sources = load_sources(config.source, tapped) if config.source else None
    further = FurtherSets(config, dataset, source, datasets) if config.evaluate.asked else None
    weights = fingerprint(source.weights())
    name, identity = name_of(config, data, weights, sources)
    directory = RunDirectory(Path(config.results_dir) / "runs" / name, writes=devices.rank() == 0)
    before = devices.broadcast_from_rank0(directory.summary)
    if (finished := finished_before(name, before, config.retry_failed)) is not None:
        if further:
            further.require_in(finished.summary, name)
        predictions(finished.summary | {"folder": directory.path})  # raises Damaged if they were changed
        directory.clear_away()
        return finished
    trains_backbone = any(not stage.method.needs.frozen_backbone for stage in stages)
    shapes = source.map_shapes(micro_batch, config.backbone.image_size, training=trains_backbone)
    for other in sources or ():  # a network that does not fit is found here, before there is a run
        other.network.map_shapes(1, config.backbone.image_size, training=False)
    say_what_it_trains(name, config, dataset, splits, len(stages))
    loader = task.open_loader(config, dataset, device)
    with directory:
        meanwhile = devices.broadcast_from_rank0(directory.summary)
        if meanwhile is not None and meanwhile != before and (finished := finished_before(name, meanwhile, False)):
            return finished
        directory.start_anew(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
        summary = describe(config, name, identity, dataset, splits, weights, sources, device)
        summary["overrides"] = list(overrides)
        length = config.schedule.length(len(splits.train))
        untrained_target = partial(new_target, source, config, len(dataset.classes))
        runner = StageRunner(stages, length, directory, device, untrained_target)
        summary["iterations"] = runner.iterations
        evaluator = Evaluator(task, loader, dataset, splits, config.split.measures_test)
        with failures_recorded(summary, config, directory, runner, loader, splits.train):
            for network in (source, *(other.network for other in sources or ())):
                network.to(device).to(memory_format=torch.channels_last).freeze()
            for stage in runner:  # one, but for methods such as AFA
                # --- Fitting the method ---

                method = stage.method
                target = runner.previous.copy() if runner.previous else untrained_target()
                target.requires_grad_(True)
                devices.synchronise_batchnorm(target.traced, device)
                for part in method.parts_to_fit():
                    fit_part(part, source, weights, config, dataset, splits, loader, directory)
                    summary["fit"] |= part.fit_report
                with torch.random.fork_rng(devices=[]):  # for modules that the method makes
                    torch.manual_seed(seed_of_modules(config.seed, runner.index))
                    method.setup(target, shapes, source_shapes(config, method, source, sources, shapes))
                method.to(device)

                # --- Optimizer and schedule ---

                optimizer = make_optimizer(target, method, config.optimizer, config.schedule)
                state = TrainState(
                    target,
                    frozen_source(config, stage, source, sources, runner.previous, device),
                    optimizer,
                    config.precision,
                    config.backbone.aux_weight,
                    config.compile,
                    config.schedule.accumulate,
                    task.loss(config, class_weights(config, dataset, splits.train, device)),
                    config.schedule.clip_norm,
                    task.correct,
                    task.loss_name,
                )

                # --- Training ---

                average = AVERAGES[config.average.name].thing(config.average)
                average.begin(
                    target,
                    partial(loader.passes, splits.train, "fit", config.seed),
                    partial(task.score, target, loader, dataset, splits.val),
                )
                progress = runner.begin(state, average)
                with (
                    Display(name, runner.iterations) as display,
                    live_view(config.logging, directory, progress.iterations_done) as show,
                    devices.stop_deferred(),
                ):
                    display.start_at(progress.iterations_done)
                    told = directory.append_metrics, partial(show_progress, display, task.inputs), show
                    ended = train(
                        state,
                        method,
                        loader,
                        splits.train,
                        config.schedule,
                        progress,
                        [
                            average,
                            *(OnLine(function) for function in told),
                            OnLine(lambda _: devices.peak_memory(device)),  # has to be called regularly
                            Checkpoints(config.schedule.checkpoint_seconds, runner.save),
                        ],
                        lr_factor=stage.lr_factor,
                        labels={"stage": runner.index + 1} if len(stages) > 1 else {},
                        evaluate=partial(evaluator, target, average.applied),
                        step=step_of(config, method, device),
                    )
                average.finish(partial(evaluator, target, average.applied))
                runner.end(ended, evaluator.scalars())
                del ended, state, optimizer, target  # the next stage needs their memory

            # --- Evaluation: nothing is selected on test data ---

            measured = evaluator.scalars() | runner.speed(config.schedule.batch_size)

            # --- Record ---

            if further:
                with runner.average.applied(runner.trained()):
                    test_images = splits.test if config.split.measures_test else splits.val
                    measured |= further.measure(source, runner.trained(), loader, test_images, task)
            summary |= measured | runner.record() | runner.average.report()
            summary |= {"peak_memory_bytes": devices.peak_memory(device), "finished": timestamp()}
            # A stop waits for the files: they take seconds, and what they hold took the run.
            with devices.stop_deferred(), runner.average.applied(runner.trained()):
                kinds = {"test": task.outputs} | ({"val": (VALIDATION, PREDICTIONS)} if task.one_label else {})
                weights_now, modules = runner.trained().cpu_weights(), runner.modules
                write_outputs(directory, summary, evaluator.latest, kinds, dataset, weights_now, modules)
                directory.write_summary(summary)
        directory.remove_checkpoint()
    result = RunResult(summary, skipped=False)
    log.info(f"{name}: {result}, {summary['train_seconds']:.0f} s")
    return result


# --- Stages and failures ---


@contextmanager
def failures_recorded(
    summary: dict[str, Any],
    config: RunConfig,
    directory: RunDirectory,
    runner: StageRunner,
    loader: BatchSource,
    indices: np.ndarray,
) -> Iterator[None]:
    """In this context every failure of the run is written into its record and raised as RunFailed.

    OSError and InUse pass through: nothing is wrong with the run, and the same command goes on with it. So does an
    error of one process among several, which may fail because another was killed: only what all see is recorded.
    """
    try:
        yield
    except (OSError, InUse):
        raise
    except Exception as error:
        if devices.processes() > 1 and not isinstance(error, NotFinite):
            raise
        failure, message = explain(error, config, runner, loader, indices)
        if failure is not None:
            with devices.rank0_first():  # it has written before another process ends, and with it all
                summary |= runner.record() | {"error": message, "failure": failure, "finished": timestamp()}
                directory.write_summary(summary)
                if failure in ("diverged", "input"):  # going on would not mend these
                    directory.remove_checkpoint()
        if failure == "program":  # the place in the program helps most
            raise
        name = directory.path.name
        if failure is None:
            raise UserError(f"{name}: {message}") from error
        raise RunFailed(f"{name}: {message}", summary) from error


# --- What a run says and leaves ---


def describe(
    config: RunConfig,
    name: str,
    identity: dict[str, Any],
    dataset: Dataset,
    splits: Splits,
    weights: str,
    sources: list[SourceNetwork] | None,
    device: torch.device,
) -> dict[str, Any]:
    """What the record says before anything is measured."""
    described = {
        "schema": SCHEMA,
        "run_id": name,
        "identity": identity,
        "titles": {
            "method": config.reg.title,
            "dataset": config.dataset.publication(READERS[config.dataset.reader].thing.publication).title,
        },
        "config": asdict(config),
        "seed": config.seed,
        "n_train": len(splits.train),
        "n_val": len(splits.val),
        "n_test": len(splits.test),
        "num_classes": len(dataset.classes),
        **TASKS[config.task].of_labels(dataset),
        "dataset_fingerprint": dataset.fingerprint,
        "weights_fingerprint": weights_name(config, weights),
        "selection": AVERAGES[config.average.name].thing.selection,
        "versions": devices.versions(),
        "device": devices.device_name(device),
        "processes": devices.processes(),
        "git_commit": git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "left_out": dataset.left_out_in_record(),
        "fit": {},
        "test_top1": None,
        "val_top1": None,
        "error": None,
        "failure": None,  # diverged | input | out of memory | program
    }
    return described if sources is None else described | {"sources": [source.record for source in sources]}

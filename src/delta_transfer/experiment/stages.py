"""What a run trains: the stages of its method, one after the other, from the last checkpoint on."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..common import interrupts
from ..common.console import Display, log
from ..common.errors import UserError
from ..config import RunConfig
from ..data.dataset import Dataset, Splits
from ..data.loader import Loader
from ..engine import processes as distributed
from ..engine.checkpoints import read_checkpoint, write_checkpoint
from ..engine.live import live_view
from ..engine.loop import TrainState, evaluate, evaluate_pairs, make_optimizer, start_at, train
from ..methods import Regularizer
from ..methods.base import MapShapes, Stage
from ..models import ArcFaceLoss, CosineHead, Network, frozen_maps
from ..records.checked import save_with_checksum
from ..records.run_directory import RunDirectory
from .fitting import fit_or_reuse
from .sources import Loaded, frozen, shapes_of


@dataclass
class StageRunner:
    """One run's training; `learner` and `regularizer` are those of stage `number`, counted from 0."""

    config: RunConfig
    stages: list[Stage]
    source: Network  # what the target starts from
    sources: list[Loaded] | None  # networks to learn from; None: `source`
    map_shapes: MapShapes
    dataset: Dataset
    parts: Splits
    weights: str  # fingerprint of the source's
    loader: Loader
    directory: RunDirectory
    number: int = field(default=0, init=False)
    learner: TrainState | None = field(default=None, init=False)
    fit_report: dict[str, float] = field(default_factory=dict, init=False)
    ended: list[dict[str, Any]] = field(default_factory=list, init=False)  # what the stages before came to
    modules: dict[str, torch.Tensor] = field(default_factory=dict, init=False)  # what their methods learned, by stage
    latest: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)  # what was measured last, by part

    @property
    def stage(self) -> Stage:
        return self.stages[self.number]

    @property
    def regularizer(self) -> Regularizer:
        return self.stage.regularizer

    @property
    def length(self) -> int:
        """Iterations of a stage."""
        return self.config.schedule.length(len(self.parts.train))

    @property
    def iterations(self) -> int:
        return len(self.stages) * self.length

    def carry_out(self) -> dict[str, Any]:
        """Trains to the end; what the summary says of it, and `test_outputs`."""
        for network in (self.source, *(source.network for source in self.sources or ())):
            network.to(self.loader.device, memory_format=torch.channels_last).freeze()
        with distributed.rank0_first():  # which removes a checkpoint that cannot be used
            checkpoint = read_checkpoint(self.directory.checkpoint_path, self.loader.device)
        previous, seconds = None, 0.0
        if checkpoint is None:
            self.directory.restore_metrics("")
        else:
            self.number, self.ended, self.modules = (checkpoint[key] for key in ("stage", "ended", "modules"))
            if checkpoint["previous"] is not None:
                previous = self._previous(checkpoint["previous"])
        while True:
            self.learner = None  # of the stage before: room for the next
            self.learner = self._learner(previous)
            if checkpoint:
                progress = self._resume(checkpoint)
                checkpoint = None
            else:
                progress = start_at(self.number * self.length, seconds)
                if self.number:  # what the stage before has come to is safe from here on
                    self._save(previous, progress)
                    if interrupts.received() is not None:
                        raise interrupts.Stopped
            seconds = self._train(previous, progress)
            stage = {"method": type(self.regularizer).__name__, "iterations": self.length}
            self.ended = [*self.ended, stage | self._measured()]
            learned = ((name, p) for name, p in self.regularizer.named_parameters() if p.requires_grad)
            for name, parameter in learned:
                self.modules[f"stage{self.number + 1}.{name}"] = parameter.detach().cpu().clone()
            if self.number + 1 == len(self.stages):
                break
            self.number += 1
            previous = self.learner.target.copy().freeze()
            if self.stage.aligned_to == "previous" and self.modules:  # whose maps the next modules are a function of
                self.directory.write(f"stage{self.number}.safetensors", save_with_checksum(cpu_weights(previous)))
        return self._measured() | {
            "train_seconds": seconds,
            "images_per_second": self.iterations * self.config.schedule.batch_size / seconds,
            "test_outputs": self.latest.get("test"),
        }

    def so_far(self) -> dict[str, Any]:
        """For the record, whether the run ends well or not; a stage that it did not finish has no measurements."""
        planned = [{"method": type(s.regularizer).__name__, "iterations": self.length} for s in self.stages]
        stages = self.ended + planned[len(self.ended) :]
        return {"fit": self.fit_report} | ({"stages": stages} if len(stages) > 1 else {})

    def _previous(self, state: dict[str, torch.Tensor]) -> Network:
        """The network that the stage before the checkpoint's left."""
        network = new_target(self.source, self.config, len(self.dataset.classes))
        network.traced.load_state_dict(state)
        return network.freeze()

    def _learner(self, previous: Network | None) -> TrainState:
        """The target as the stage finds it, beside what it is aligned to; the method is fitted and started."""
        config, regularizer = self.config, self.regularizer
        classes = len(self.dataset.classes)
        target = previous.copy() if previous else new_target(self.source, config, classes)
        target.requires_grad_(True)
        distributed.synchronise_batchnorm(target.traced, self.loader.device)
        for method in regularizer.to_fit():
            fitted_to = describe_fit(config, method, self.weights, self.parts.fingerprint(self.dataset))
            batches = self.loader.passes(self.parts.train, "fit", method.fit_seed)
            if method.fits_plain:
                batches = self.loader.centres(self.parts.train)
            cache = Path(config.cache_dir)
            with distributed.rank0_first():
                fit_or_reuse(method, self.source, batches, classes, fitted_to, self.directory, cache)
            self.fit_report |= method.fit_report
        with torch.random.fork_rng(devices=[]):
            # Of modules that the method makes; another one in a later stage, whose modules would begin alike.
            later = int(np.random.default_rng((config.seed, self.number)).integers(2**32))
            torch.manual_seed(later if self.number else config.seed)
            regularizer.start(target, self.map_shapes, self._source_shapes())
        regularizer.to(self.loader.device)

        return TrainState(
            target,
            self._frozen(previous) if regularizer.needs_source else None,
            make_optimizer(target, regularizer, config.schedule),
            config.precision,
            config.backbone.aux_weight,
            config.compile,
            config.schedule.accumulate,
            ArcFaceLoss(**vars(config.arcface)) if config.task == "verification" else F.cross_entropy,
        )

    def _source_shapes(self) -> MapShapes | None:
        """Of the maps, and logits where the method needs them, of `sources`; None if they are those of the target."""
        with_logits = self.regularizer.needs_source_logits
        if self.sources is None:
            return {**self.map_shapes, "logits": (self.source.classes,)} if with_logits else None
        return shapes_of(self.sources, 1, self.config.backbone.image_size, with_logits)

    def _frozen(self, previous: Network | None) -> nn.Module:
        """Of what the stage learns from only the maps are wanted, and logits where the method needs them."""
        with_logits, precision = self.regularizer.needs_source_logits, self.config.precision
        if previous and self.stage.aligned_to == "previous":
            return frozen_maps(previous, with_logits, precision)
        if self.sources is None:
            return frozen_maps(self.source, with_logits, precision)
        return frozen(self.sources, self.config.backbone, with_logits, precision).to(self.loader.device)

    def _train(self, previous: Network | None, progress: dict[str, Any]) -> float:
        """Seconds of training so far, of all stages."""
        config = self.config
        # Every part is measured, nothing is selected: the last iteration is what counts.
        measured = (["val"] if len(self.parts.val) else []) + (["test"] if config.split.measures_test else [])

        def evaluate_now() -> dict[str, float]:
            for part in measured:
                what = self.learner.target, self.loader, getattr(self.parts, part)
                if part == "test" and self.dataset.pairs is not None:
                    self.latest[part] = evaluate_pairs(*what, self.dataset.pairs, config.precision)
                else:
                    self.latest[part] = evaluate(*what, config.precision)
            return self._measured()

        with (
            Display(self.directory.path.name, self.iterations) as display,
            live_view(config.logging, self.directory, progress["iterations_done"]) as show,
            interrupts.deferred(),
        ):
            display.start_at(progress["iterations_done"])

            def log(line: dict[str, Any]) -> None:
                if len(self.stages) > 1:
                    line = {"step": line["step"], "stage": self.number + 1} | line
                self.directory.append_metrics(line)
                display.metrics(line)
                show(line)

            return train(
                self.learner,
                self.regularizer,
                self.loader,
                self.parts.train,
                config.schedule,
                first_iteration=self.number * self.length,
                lr_factor=self.stage.lr_factor,
                progress=progress,
                evaluate_now=evaluate_now,
                log=log,
                checkpoint=lambda progress: self._save(previous, progress),
            )

    def _measured(self) -> dict[str, float]:
        measured = {f"{part}_{key}": value for part, latest in self.latest.items() for key, value in latest.items()}
        return {key: value for key, value in measured.items() if isinstance(value, float)}

    def _save(self, previous: Network | None, progress: dict[str, Any]) -> None:
        if not self.directory.writes:
            return
        state = {
            "target": self.learner.target.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "regularizer": self.regularizer.state_dict(),
            "stage": self.number,
            "ended": self.ended,
            "modules": self.modules,
            "previous": previous.traced.state_dict() if previous else None,
            "progress": progress,
            "metrics": self.directory.metrics(),
        }
        with self.directory.open(self.directory.checkpoint_path.name) as file:
            write_checkpoint(file, state, self.loader.device)

    def _resume(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Go back to a checkpoint of this stage: the progress that training goes on from."""
        try:
            self.learner.target.load_state_dict(checkpoint["target"])
            self.learner.optimizer.load_state_dict(checkpoint["optimizer"])
            self.regularizer.load_state_dict(checkpoint["regularizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            path = self.directory.checkpoint_path
            raise UserError(f"{path} is of a version with another method or network. It is removed.") from error
        self.directory.restore_metrics(checkpoint["metrics"])
        progress = checkpoint["progress"]
        log.info(f"{self.directory.path.name}: resuming after iteration {progress['iterations_done']}")
        return progress


def new_target(source: Network, config: RunConfig, classes: int) -> Network:
    """The network that a run trains, before the first step."""
    head = partial(CosineHead, scale=config.arcface.scale) if config.task == "verification" else None
    return source.with_new_head(classes, config.seed, head)


def cpu_weights(network: Network) -> dict[str, torch.Tensor]:
    """Under the model's own parameter names, for a file."""
    return {key: value.cpu().contiguous() for key, value in network.weights().items()}


def describe_fit(config: RunConfig, regularizer: Regularizer, weights: str, data: str) -> dict[str, Any]:
    """Everything that decides what `fit` computes."""
    backbone, schedule = config.backbone, config.schedule
    term = regularizer.fitted_term
    return {
        "method": (config.reg if term is None else config.reg.terms[term]).name,
        "backbone": backbone.name,
        "weights": weights,
        "taps": backbone.taps,
        "data": data,
        "pixels": [backbone.resize, backbone.image_size, backbone.mean, backbone.std, config.dataset.mirror],
        "crops": [
            schedule.aspect,
            schedule.train_crop,
            schedule.min_crop_area,
            *([schedule.pad] if schedule.pad else []),
        ],
        "batch_size": schedule.batch_size,
        "options": regularizer.fit_options(),
        "seed": regularizer.fit_seed,
    }

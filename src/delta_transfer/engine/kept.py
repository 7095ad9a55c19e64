"""Further measurements after a run: what the network kept of its source, and accuracies on other test sets."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..common.console import log_once, shorten_list
from ..common.errors import UserError
from ..common.options import OptionError
from ..data import load_once
from ..data.dataset import Dataset
from ..data.loader import BatchSource
from ..data.options import DatasetConfig
from ..data.readers.folder import FolderConfig
from ..methods.lp_ft import logistic_regression
from ..models import Network
from .tasks import Line, evaluate, outputs_of

if TYPE_CHECKING:
    from .config import RunConfig

C, STEPS = 1.0, 200  # of the linear probe: LP-FT's regression with a fixed strength


def further_sets(config: "RunConfig") -> tuple[dict[str, DatasetConfig], DatasetConfig | None]:
    """The data sets of `evaluate.also`, by name, and that of `evaluate.probe`."""
    also = {name: FolderConfig(reader="folder", name=name, root=root) for name, root in config.evaluate.also.items()}
    probe = config.evaluate.probe
    if isinstance(probe, str):
        probe = FolderConfig(reader="folder", name=Path(probe).name or "probe", root=probe)
    return dict(also), probe


class FurtherSets:
    """The data sets of `evaluate.*`, read and checked before the run begins.

    source: None in a plan, which may not have its weights. datasets: those that the command has read. Raises UserError
    for a set that does not fit, and for a probe whose classes cannot be those of the source's head.
    """

    def __init__(self, config: "RunConfig", dataset: Dataset, source: Network | None, datasets: dict[str, Dataset]):
        classes = dataset.classes
        self.config, self.options, cache = config, config.evaluate, Path(config.cache_dir)
        if (self.options.forgetting or self.options.also) and config.task != "classification":
            raise OptionError("evaluate", f"evaluate.* is for task=classification, not {config.task}.")
        also, probe = further_sets(config)
        self.also: dict[str, Dataset] = {}
        self.probe = load_once(probe, cache, datasets) if probe else None
        for name, wanted in also.items():
            read = load_once(wanted, cache, datasets)
            if unknown := sorted(set(read.classes) - set(classes)):
                raise OptionError(
                    "evaluate.also",
                    f"evaluate.also.{name}={wanted.root} has classes that the run does not train: "
                    f"{shorten_list(unknown)}.",
                )
            if trained := read.in_train_of(dataset):
                log_once(f"{name}: images that are also in train: {len(trained):,} ({shorten_list(trained)})")
            mapped = np.array([classes.index(one) for one in read.classes])[read.labels]
            self.also[name] = replace(read, labels=mapped, classes=classes)
        of_source = self.probe if self.options.source_labels else None
        if source and of_source and len(of_source.classes) != source.classes:
            raise OptionError(
                "evaluate.source_labels",
                f"evaluate.source_labels: {of_source.name} has {len(of_source.classes)} classes, and the source's "
                f"head {source.classes}.",
            )

    def require_in(self, summary: Mapping[str, Any], name: str) -> None:
        """Raises UserError if a finished run's record lacks a measurement that is asked for."""
        wanted = [f"also_{one}_top1" for one in self.options.also]
        wanted += ["kept_agreement"] if self.options.forgetting else []
        wanted += ["kept_probe_top1"] if self.options.probe is not None else []
        wanted += ["kept_source_top1"] if self.options.source_labels else []
        if missing := [key for key in wanted if key not in summary]:
            raise UserError(
                f"{name} is finished, and its record has no {shorten_list(missing)}: repeat the run with evaluate.* in "
                "another results_dir=FOLDER."
            )

    def measure(self, source: Network, target: Network, loader: BatchSource, test: np.ndarray, task: Any) -> Line:
        """Accuracies in percent. test: images that the run measures; those of the validation split on folds.

        kept_agreement: the share of `test` for which the source's own head predicts the same class from the target's
        embeddings as from the source's, 100 before training. kept_probe_top1: a logistic regression on the embeddings
        of the probe's training images, measured on its test images; kept_probe_top1_before: the same with the source's
        embeddings. kept_source_top1, kept_source_top1_before: the source's head on the probe's test images.
        also_NAME_top1, also_NAME_loss: the target on all images of a further set.
        """
        device, found = loader.device, Line()
        sets = {name: dataset.fingerprint for name, dataset in self.also.items()}
        for name, dataset in self.also.items():
            measured = evaluate(target, task.open_loader(self.config, dataset, device), np.arange(len(dataset.labels)))
            found |= {f"also_{name}_{key}": measured[key] for key in ("top1", "loss")}
        if self.options.forgetting:
            both = [outputs_of(network, loader, test, "embedding")[0] for network in (source, target)]
            said = [source_head(source, embedding).argmax(dim=1) for embedding in both]
            found["kept_agreement"] = percent(said[0] == said[1])
        if self.probe is not None:
            sets[self.probe.name] = self.probe.fingerprint
            other = task.open_loader(self.config, self.probe, device)
            for network, suffix in ((source, "_before"), (target, "")):
                found |= {f"{key}{suffix}": value for key, value in self._probed(source, network, other).items()}
        return found | ({"further_sets": sets} if sets else {})

    def _probed(self, source: Network, network: Network, loader: BatchSource) -> Line:
        assert self.probe is not None
        parts = [np.flatnonzero(~self.probe.is_test), np.flatnonzero(self.probe.is_test)]
        (train, labels), (test, wanted) = (outputs_of(network, loader, part, "embedding") for part in parts)
        found: Line = {}
        if self.options.source_labels:
            found["kept_source_top1"] = percent(source_head(source, test).argmax(dim=1) == wanted)
        mean, std = train.mean(), train.std()
        head = logistic_regression((train - mean) / std, labels.clone(), len(self.probe.classes), C, STEPS)
        return found | {"kept_probe_top1": percent(F.linear((test - mean) / std, *head).argmax(dim=1) == wanted)}


def source_head(source: Network, embedding: Tensor) -> Tensor:
    """The logits of the source's own head, (N, K_s), for embeddings (N, D) on the CPU."""
    head = {name.rpartition(".")[2]: p.detach().cpu() for name, p in source.head_parameters().items()}
    return F.linear(embedding, head["weight"], head.get("bias"))


def percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()

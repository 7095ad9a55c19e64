"""Which run a configuration describes, and whether it has ended. Shared data sets and networks are read once."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..data import load_once
from ..data.dataset import Dataset, Splits, make_splits
from ..engine.config import RunConfig, name_of
from ..engine.devices import pick_device, pick_precision
from ..models.sources import SourceNetwork, load_sources
from ..models.zoo import build_source, not_downloaded
from ..records.arrays import predictions
from ..records.checked import fingerprint
from ..records.run_directory import RunDirectory, RunResult, finished_before


@dataclass(frozen=True)
class Found:
    """What a run is made of. None stands for what is not here."""

    dataset: Dataset | None
    splits: Splits | None
    weights: str | None  # fingerprint of the source's weights
    directory: RunDirectory | None  # its name follows from all of it


@dataclass
class Lookup:
    """Finds runs by their configurations. It reads each data set and each network once, and remembers them.

    datasets: those that the command has read, for the runs after it, too.
    """

    datasets: dict[str, Dataset] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # what is not here -> why
    _known: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def find(self, config: RunConfig) -> Found:
        """What the run `config` is made of. It gets its precision and its length, as in a run.

        Raises UserError for a data set that is not here and whose size nobody knows.
        """
        config.precision = pick_precision(config.precision, pick_device(config.device))
        dataset = self.dataset(config)
        splits = None if dataset is None else self._splits(dataset, config)
        if splits is not None:
            config.schedule = config.schedule.fitted_to(splits.for_training)
        weights, sources = self.weights(config), self._sources(config)
        if dataset is None or weights is None or (config.source is not None and not sources):
            return Found(dataset, splits, weights, None)
        name, _ = name_of(config, dataset.fingerprint, weights, sources)
        return Found(dataset, splits, weights, RunDirectory(Path(config.results_dir) / "runs" / name))

    def finished(self, config: RunConfig) -> RunResult | None:
        """The run if it is finished, without a look at its images or its network. None: the run has to look itself.

        That is so for a run that failed, lacks a file, or is asked for further measurements.
        """
        begins = f"{config.dataset.name}-{config.backbone.name}-{config.reg.name}-s{config.seed}"
        if config.evaluate.asked or begins not in self._ended(Path(config.results_dir) / "runs"):
            return None
        try:
            directory = self.find(deepcopy(config)).directory
            summary = directory.summary() if directory else None
            if directory is None or summary is None or summary.get("error") is not None:
                return None
            if _changed_later(directory.path / "predictions.npz", directory.path / "summary.json"):
                predictions(summary | {"folder": directory.path})  # raises Damaged if they are not the run's
            directory.clear_away()
            return finished_before(directory.path.name, summary, retry_failed=False)
        except (UserError, OSError):  # the run itself reports it
            return None

    def _ended(self, folder: Path) -> set[str]:
        """The names of runs in a folder, without their hashes."""
        return self.once(("runs", folder), lambda: {path.name.rpartition("-")[0] for path in folder.glob("*")})

    def dataset(self, config: RunConfig) -> Dataset | None:
        """The data set; None if it is not here. Raises UserError if nobody knows its size either."""
        wanted = config.dataset

        def load() -> Dataset | None:
            try:
                return load_once(wanted.replace(download=False), Path(config.cache_dir), self.datasets)
            except UserError as error:
                fetch = "dataset.download=true will fetch it first" if wanted.download else str(error)
                self.missing[f"data set {wanted.name}"] = fetch
                if wanted.official is None:  # its size is unknown
                    raise
                return None

        return self.once(("dataset", repr(wanted)), load)

    def _splits(self, dataset: Dataset, config: RunConfig) -> Splits:
        draw, split = config.dataset, config.split
        key = ("splits", repr((draw, split)), config.seed if draw.redraw else None)  # else no seed changes it
        return self.once(key, lambda: make_splits(dataset, draw, split, config.seed))

    def weights(self, config: RunConfig) -> str | None:
        """Fingerprint of the source weights; None if they are not here."""

        def read() -> str | None:
            try:
                missing = not_downloaded(config.backbone)
                if missing:
                    raise UserError(missing)
                return fingerprint(build_source(config.backbone, config.seed, tapped=False).weights())
            except UserError as error:
                self.missing[f"weights of {config.backbone.name}"] = str(error)
                return None

        seed = config.seed if config.backbone.weights == "none" else None
        return self.once(("weights", repr(config.backbone), seed), read)

    def _sources(self, config: RunConfig) -> list[SourceNetwork] | None:
        """The networks of `config.source`; None if there are none or one of them is not here."""

        def read() -> list[SourceNetwork] | None:
            try:
                for source in config.source:
                    if missing := not_downloaded(source.backbone):
                        raise UserError(missing)
                return load_sources(config.source, tapped=False)
            except UserError as error:
                self.missing[f"source {', '.join(source.name for source in config.source)}"] = str(error)
                return None

        return self.once(("sources", repr(config.source)), read) if config.source else None

    def once(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def _changed_later(path: Path, reference: Path) -> bool:
    """Whether the file `path` is there and was changed after `reference`, which was written after it."""
    try:
        return path.stat().st_mtime_ns > reference.stat().st_mtime_ns
    except FileNotFoundError:
        return False

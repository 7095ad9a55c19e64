"""delta-run: compose a configuration, check it, carry out the run. The road of a run is experiment/experiment.py."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..common.console import Display, log, show_messages
from ..common.errors import UserError
from ..common.options import require
from ..common.tables import Entry, Table, entries, on_screen
from ..engine import devices
from ..engine.config import RunConfig
from ..engine.devices import Stopped, forget_stop, stop_deferred, stop_enabled, stop_signal
from ..experiment.choosing import Made, ruled_out
from ..experiment.experiment import run
from ..experiment.planning import Plan
from ..experiment.pretraining import pretrain_missing
from ..records.locks import InUse
from ..records.run_directory import RunResult
from . import which_is_best
from .compose import (
    check_overrides,
    check_values,
    compose_config,
    hydra_raises,
    in_our_words,
    register_schemas,
    to_run_config,
    words_of_job,
)

register_schemas()  # on import, so that they are also there in the worker processes of a launcher


def main(config_name: str = "config") -> None:
    show_messages()
    Outcome.of_this_command.clear()
    forget_stop()
    if devices.shared() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process speaks for all
    if "dry_run=true" in sys.argv:  # looks at all jobs in this process, whatever would launch them
        sys.argv = [word for word in sys.argv if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    command, words_of_sweep = sys.argv, sys.argv[1:]
    planned: list[Plan] = []

    @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
    def job(composed: DictConfig) -> Outcome | None:
        sys.argv = command  # a worker has another one, but the record calls this the run's command
        Display.run_of_sweep = which_of_sweep(words_of_sweep)
        return run_job(composed, planned)

    def compose_first_job(words: list[str]) -> tuple[RunConfig, dict[str, str]]:
        """The configuration of the first of the jobs that a command has, and the parameters of its sweep."""
        found: list[tuple[RunConfig, dict[str, str]]] = []

        @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
        def first(composed: DictConfig) -> None:
            check_overrides(words_of_job())
            config = to_run_config(composed)
            check_values(words_of_job(), config)
            found.append((config, dict(HydraConfig.get().sweeper.params or {})))

        sys.argv = [command[0], *words, "hydra.mode=RUN"]
        first()
        return found[0]

    def sweep(words: list[str]) -> list[Made]:
        """Carries out the jobs of another command as a part of this one, or plans them."""
        ended, seen = len(outcomes), len(planned[0].jobs) if planned else 0
        words_of_sweep[:] = words
        sys.argv = [command[0], "-m", *words]
        job()
        if stop_signal() is not None:
            raise Stopped
        jobs = planned[0].jobs[seen:] if planned else []
        return [(outcome.state, outcome.record) for outcome in outcomes[ended:]] + [(j.state, j.record) for j in jobs]

    outcomes = Outcome.of_this_command
    stopped_by, composed, verdict = None, True, []
    alone = not devices.shared()
    try:
        # Between its own jobs this process waits for workers. They get a terminal's Ctrl-C themselves, and end.
        with hydra_raises(), stop_enabled() if alone else nullcontext(), stop_deferred([signal.SIGINT]):
            if "+experiment=which_is_best" in command and not any(map(ONLY_SHOWN.fullmatch, command)):
                require(alone, "+experiment=which_is_best makes many runs: start it without torchrun.")
                verdict = which_is_best.compare_methods(command[1:], compose_first_job, sweep)
            else:
                job()
    except KeyboardInterrupt:
        stopped_by = signal.SIGINT
    except Exception as error:  # of the configuration or a launcher: a job returns what happens in it
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        composed = False
        log.error(in_our_words(error))
    for outcome in outcomes:
        if outcome.unseen:
            log.error(outcome.reason)
    if any(outcome.of_sweep for outcome in outcomes):
        sys.stdout.write("\n" + on_screen([table(outcomes)], sys.stdout.isatty()))
    for line in verdict:
        log.info(line)
    devices.leave()
    for plan_of_all in planned:
        plan_of_all.show()
    if (number := stop_signal() or stopped_by) is not None:
        log.error(f"stopped by {signal.Signals(number).name}: the same command goes on where it was")
        sys.exit(128 + number)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if verdict:
        failed = [outcome for outcome in failed if not ruled_out(outcome.record)]
    sys.exit(0 if composed and not failed else 1)


# --- Jobs ---

ONLY_SHOWN = re.compile(r"-h|--help|--hydra-help|--version|-c|--cfg(=.*)?|-i|--info(=.*)?|-sc|--shell-completion")
STATES = ("done", "skipped", "failed", "in work", "stopped")


class Outcome:
    """What a job returns; `of_this_command` has all of them.

    A job that raised would end a sweep: Hydra's sweeper reports the first exception and starts no further batch. Hydra
    shows nobody what jobs return. But a return value is either made in this process or, when a launcher's worker sends
    it, unpickled here: both are noted.
    """

    of_this_command: "ClassVar[list[Outcome]]" = []

    def __init__(
        self,
        overrides: list[str],
        state: str,
        reason: str,
        unseen: bool,
        of_sweep: bool,
        record: dict[str, Any] | None = None,
    ):
        self.overrides, self.state, self.reason = overrides, state, reason
        self.record = record  # the summary of a run that finished or failed
        self.unseen, self.of_sweep = unseen, of_sweep  # unseen: a worker wrote the reason into a file
        self.of_this_command.append(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.of_this_command.append(self)


def which_of_sweep(words: Sequence[str]) -> str:
    """run 3 of 18, of the sweep that a command's `words` ask for; empty for a single run. In a running Hydra."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return ""
    params = [f"{key}={values}" for key, values in (hydra_config.sweeper.params or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *(word for word in words if word[0] != "-")])
    last = {override.key_or_group: override for override in overrides}
    sweeps = [override for override in last.values() if override.is_sweep_override()]
    return f"run {hydra_config.job.num + 1} of {prod(len(list(one.sweep_iterator())) for one in sweeps)}"


def run_job(composed: DictConfig, planned: list[Plan]) -> Outcome | None:
    """One job, in this process or in a launcher's worker. A dry run adds it to the one Plan in `planned` instead."""
    show_messages()
    hydra_config, overrides = HydraConfig.get(), words_of_job()
    launcher = hydra_config.runtime.choices["hydra/launcher"]
    sweep = hydra_config.mode == RunMode.MULTIRUN
    parallel = sweep and launcher != "basic"
    Display.bars = not parallel

    def ended(state: str, reason: str = "", unseen: bool = False, record: dict[str, Any] | None = None) -> Outcome:
        return Outcome(overrides, state, reason, unseen, of_sweep=sweep, record=record)

    # A job in this process leaves signals to the command. submitit's workers and torchrun handle them themselves.
    in_worker = parallel and launcher == "joblib"
    try:
        with stop_enabled(worker=True) if in_worker else stop_deferred([]):
            if stop_signal() is not None:
                raise Stopped
            # The whole configuration is checked before anything slow is read.
            check_overrides(overrides)
            config = to_run_config(composed)
            check_values(overrides, config)
            if not config.dry_run:
                result = fit(config, overrides)
                return ended("skipped" if result.skipped else "done", str(result), record=result.summary)
            require(not parallel, "dry_run=true looks at all jobs in one process: it needs hydra/launcher=basic.")
            if not sweep:
                log.info(OmegaConf.to_yaml(composed, resolve=True))
            if not planned:
                planned.append(Plan(pretraining_recipe))
            planned[0].add(config)
            return None
    except KeyboardInterrupt:
        outcome = ended("stopped")
        if not in_worker:  # it ends the sweep
            raise
        return outcome
    except InUse as error:  # a sweep in another shell has this run: no failure, if there are others to do
        log.error(str(error))
        if devices.shared():
            sys.exit(1)
        return ended("in work" if sweep else "failed", str(error))
    except Exception as error:
        told = isinstance(error, UserError | OSError)  # OSError: a full disk, a folder that cannot be written
        if not told:  # the program is wrong: the place in it helps
            traceback.print_exc()
        message = str(error) if told else f"{type(error).__name__}: {error}"
        log.error(message)
        if devices.shared():
            sys.exit(1)  # the other processes wait for this one, and torchrun ends them
        # The other jobs of a sweep go on.
        unseen = parallel and launcher.startswith("submitit")
        return ended("failed", message, unseen, record=getattr(error, "record", None))


def fit(config: RunConfig, overrides: Sequence[str]) -> RunResult:
    """The run that `config` describes, after the one that trains its source network where that is missing."""
    if config.embedded_backbones:
        pretrain_missing(config, pretraining_recipe)
    return run(config, overrides)


def pretraining_recipe(config: RunConfig) -> RunConfig:
    """conf/pretrain.yaml for the run `config`, in a running Hydra."""
    return _recipe().replace(
        results_dir=str(Path(config.results_dir) / "pretrained"),
        cache_dir=config.cache_dir,
        device=config.device,
        retry_failed=config.retry_failed,
    )


@cache
def _recipe() -> RunConfig:
    """Composed once for all jobs of a sweep."""
    return compose_config("pretrain", [])


def table(outcomes: Sequence[Outcome]) -> Table:
    """Runs by state. Those that were not made stand one by one: what sets each apart, and the reason's first line."""
    rows = []
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    for state in STATES:
        members = [outcome for outcome in outcomes if outcome.state == state]
        if members and state in ("done", "skipped"):
            rows.append(entries(state, Entry(str(len(members)), len(members)), "", ""))
            continue
        for index, outcome in enumerate(members):
            which = " ".join(override for override in outcome.overrides if override not in common)
            reason = (outcome.reason.splitlines() or [""])[0]
            count = Entry("" if index else str(len(members)), len(members))
            rows.append(entries("" if index else state, count, which, reason))
    made = Table("", ["", "runs", "which", "reason"], rows, 1)
    return made if any(row[2].text or row[3].text for row in rows) else made.columns([0, 1])

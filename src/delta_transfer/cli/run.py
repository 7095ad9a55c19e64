"""delta-run: composes a configuration, checks it, and carries out the run by experiment/experiment.py."""

import copy
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .. import __version__
from ..common import cores
from ..common.console import Display, log, quiet_pipe, show_messages
from ..common.errors import UserError, in_words
from ..common.options import require
from ..common.tables import Entry, Table, entries, on_screen
from ..data import Dataset, datasets_of
from ..engine import devices
from ..engine.config import RunConfig
from ..engine.devices import Stopped, forget_stop, stop_deferred, stop_enabled, stop_signal
from ..experiment.choosing import Made, ruled_out
from ..experiment.experiment import run
from ..experiment.lookup import Lookup
from ..experiment.planning import Plan
from ..records.locks import InUse
from ..records.run_directory import RunResult
from . import which_is_best
from .compose import (
    MULTIRUN,
    SHOWS,
    UsageError,
    check_keys,
    checked_config,
    compose,
    for_hydra,
    is_sweep,
    option_value,
    parsed,
    register_schemas,
    repeated,
    running_hydra,
    split_options,
)
from .explain import explain
from .help import help_page, show_choices
from .sweep import CheckedSweeper, Jobs, first_values, for_sweep, take_the_sweepers_place

register_schemas()  # on import, so that they are also there in the worker processes of a launcher
PROGRAMS = {"config": "delta-run", "pretrain": "delta-pretrain"}
WHICH_IS_BEST = "+experiment=which_is_best"


@quiet_pipe()
def main(config_name: str = "config") -> None:
    show_messages()
    Outcome.of_this_command.clear()
    forget_stop()
    if devices.shared() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process speaks for all
    program = program_of(sys.argv[0], PROGRAMS.get(config_name, ""))
    if program == PROGRAMS.get(config_name):
        sys.argv[0] = program  # python -m delta_transfer.train, in records: a command to copy
    try:
        options, typed = split_options(sys.argv[1:])
    except UsageError as error:
        log.error(f"{error} See {program} --help")
        sys.exit(2)
    if "--version" in options:
        print(f"{program} {__version__}")
        sys.exit(0)
    if typed == ["help"]:
        options, typed = ["--help"], []
    if "help" in typed or any(word.endswith("=?") for word in typed):
        sys.exit(show_choices(typed, option_value(options, "-cd", "--config-dir")))
    sys.exit(run_command(config_name, program, options, typed))


def run_command(config_name: str, program: str, options: list[str], typed: list[str]) -> int:
    """The exit status of a command with these options and words."""
    command, config_dir = sys.argv, option_value(options, "-cd", "--config-dir")
    only_shown = any(option.partition("=")[0] in SHOWS for option in options)
    planned: list[Plan] = []
    began = time.time_ns()
    lookup = Lookup(datasets_of(began))
    outcomes = Outcome.of_this_command
    alone = not devices.shared()
    words: list[str] = []
    several = False

    @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
    def job(composed: DictConfig) -> Outcome | None:
        sys.argv = command  # for the record: Hydra and workers have words of their own here
        Display.run_of_sweep = run_of_sweep()
        return run_job(composed, planned, began)

    def before_sweep(jobs: Jobs) -> list[list[str]]:
        if dry := [config for config in jobs.values() if config.dry_run]:
            planned[:] = planned or [Plan(lookup=lookup)]
            planned[0].runs += len(dry)
            planned[0].name_missing(dry)  # before anything is measured, which takes minutes
        return without_finished(jobs, datasets_of(began))

    def start(options: list[str], words: list[str]) -> None:
        register_schemas()  # again, since a program may register a method of its own after it imported this file
        sys.argv = [command[0], *options, *words]
        take_the_sweepers_place(before_sweep)  # every time, since joblib with one worker renews Hydra's list of plugins
        job()
        look_again(outcomes, datasets_of(began))

    def compose_first_job(words: list[str]) -> tuple[RunConfig, dict[str, str]]:
        """The configuration of the first job of a command, and the parameters of its sweep."""
        with running_hydra(config_dir) as loader:
            composed = compose(loader, config_name, words)
            return checked_config(composed, words), dict(composed.hydra.sweeper.params or {})

    def sweep(words: list[str]) -> list[Made]:
        """Carries out the jobs of another command as a part of this one, or plans them."""
        ended, seen = len(outcomes), len(planned[0].jobs) if planned else 0
        start([option for option in options if option not in MULTIRUN] + ["-m"], for_sweep(words))
        if stop_signal() is not None:
            raise Stopped
        jobs = planned[0].jobs[seen:] if planned else []
        return [(outcome.state, outcome.record) for outcome in outcomes[ended:]] + [(j.state, j.record) for j in jobs]

    stopped_by, composed, verdict = None, True, []
    try:
        # Between its own jobs this process waits for workers. They get a terminal's Ctrl-C themselves, and end.
        with hydra_raises(), stop_enabled() if alone else nullcontext(), stop_deferred([signal.SIGINT]):
            several = is_sweep(config_name, options, typed, config_dir)
            words = for_hydra(typed, several)
            if "dry_run=true" in words:  # looks at all jobs in this process, whatever would launch them
                words = [word for word in words if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
            if only_shown:
                words, options = first_values(words), [option for option in options if option not in MULTIRUN]
                with running_hydra(config_dir) as loader:
                    check_keys(shown := compose(loader, config_name, words))
                    page = help_page(shown, words, config_dir)
                if set(options) & {"-h", "--help"}:
                    sys.stdout.write(page)
                else:
                    start(options, words)
            elif WHICH_IS_BEST in words:
                require(alone, f"{WHICH_IS_BEST} makes many runs: start it without torchrun.")
                verdict = which_is_best.compare_methods(words, compose_first_job, sweep, lookup)
            else:
                for line in repeated(typed):
                    log.info(line)
                start(options, for_sweep(words) if several else words)
    except KeyboardInterrupt:
        stopped_by = signal.SIGINT
    except BrokenPipeError:
        raise
    except Exception as error:  # from the configuration or a launcher, since a job returns its own errors
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        composed = False
        if isinstance(error, HydraException) or not isinstance(error, UserError | OSError):
            with running_hydra(config_dir) as loader:
                swept = [word for word in words if several and parsed(word).is_sweep_override()]
                error = explain(loader, config_name, [word for word in words if word not in swept])
        log.error(in_words(error))
    finally:
        sys.argv = command
    note_finished(outcomes, datasets_of(began))  # a command that was stopped did not look again
    for outcome in outcomes:
        if outcome.unseen:
            log.error(outcome.reason)
    if any(outcome.of_sweep for outcome in outcomes):
        sys.stdout.write("\n" + on_screen([table(outcomes)], sys.stdout.isatty()))
    if found := [said for said in verdict if not isinstance(said, str)]:
        sys.stdout.write("\n" + on_screen(found, sys.stdout.isatty()) + "\n")
    for line in (said for said in verdict if isinstance(said, str)):
        log.info(line)
    devices.leave()
    number = stop_signal() or stopped_by
    for plan_of_all in (plan for plan in planned if plan.jobs):
        plan_of_all.show(stopped=number is not None)
    again = shlex.join([*program.split(), *command[1:]])
    if number is not None:
        what = "starts over" if planned else "goes on where it was"
        log.error(f"stopped by {signal.Signals(number).name}: the same command {what}: {again}")
        return 128 + number
    if planned and composed and all(outcome.state != "failed" for outcome in outcomes):
        made = shlex.join([*program.split(), *(word for word in command[1:] if not word.startswith("dry_run="))])
        log.info(f"{'Once all is ready' if planned[0].not_ready else 'Next'}: {made}")
    elif alone and not planned:
        for line in next_steps(outcomes, again, tables=not verdict):
            log.info(line)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if verdict:
        failed = [outcome for outcome in failed if not ruled_out(outcome.record)]
    return 0 if composed and not failed else 1


def program_of(started: str, usual: str) -> str:
    """The program's name as the user types it."""
    name = Path(started).name
    if not name.endswith(".py"):
        return name
    return usual if name in ("train.py", "pretrain.py", "run.py") else f"python {shlex.quote(started)}"


def next_steps(outcomes: "Sequence[Outcome]", again: str, tables: bool = True) -> list[str]:
    """The next steps after these runs, as commands to copy; with `tables` also those that show the results."""
    lines = []
    if elsewhere := sum(outcome.state == "in progress" for outcome in outcomes):
        them = "1 run is" if elsewhere == 1 else f"{elsewhere} runs are"
        lines.append(f"{them} in progress elsewhere. Once that has ended, repeat the command: {again}")
    if any(outcome.state == "failed" and outcome.record for outcome in outcomes):
        lines.append(f"To try failed runs again: {again} retry_failed=true")
    ended = [outcome for outcome in outcomes if tables and outcome.state in ("done", "skipped")]
    for folder, on_folds in dict.fromkeys((one.results_dir, one.on_folds) for one in ended):
        lines.append(f"Next: {shlex.join(['delta-report', folder, *(['--select', 'cv'] if on_folds else [])])}")
    return lines


@contextmanager
def hydra_raises() -> Iterator[None]:
    """In this context Hydra raises its errors, as it does for HYDRA_FULL_ERROR, and prints nothing."""
    asked = "HYDRA_FULL_ERROR" in os.environ
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        yield
    finally:
        if not asked:
            del os.environ["HYDRA_FULL_ERROR"]


# --- Jobs ---

STATES = ("done", "skipped", "failed", "in progress", "stopped")


class Outcome:
    """The result of a job; `of_this_command` has all of them.

    A job that raised would end a sweep: Hydra's sweeper reports the first exception and starts no further batch. Hydra
    does not hand out the results of jobs. But each result is made in this process, or is unpickled here when a
    launcher's worker sends it: both are noted.
    """

    of_this_command: "ClassVar[list[Outcome]]" = []

    def __init__(self, overrides: list[str], config: RunConfig | None, of_sweep: bool):
        self.overrides, self.config, self.of_sweep = overrides, config, of_sweep
        self.state, self.reason = "failed", ""
        self.record: dict[str, Any] | None = None  # the summary of a run that finished or failed
        self.unseen = False  # a worker wrote the reason into a file
        self.of_this_command.append(self)

    def ended(self, result: RunResult) -> None:
        self.state, self.reason, self.record = "skipped" if result.skipped else "done", str(result), result.summary

    @property
    def results_dir(self) -> str:
        return self.config.results_dir if self.config else ""

    @property
    def on_folds(self) -> bool:
        return self.config is not None and self.config.split.folds is not None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.of_this_command.append(self)


def run_of_sweep() -> str:
    """Text such as run 3 of 18; empty for a single run, and in a launcher's worker. Needs a running Hydra."""
    hydra_config, count = HydraConfig.get(), CheckedSweeper.count
    return f"run {hydra_config.job.num + 1} of {count}" if hydra_config.mode == RunMode.MULTIRUN and count else ""


def run_job(composed: DictConfig, planned: list[Plan], began: int) -> Outcome | None:
    """One job, in this process or in a launcher's worker. A dry run adds it to the one Plan in `planned` instead.

    began: when the command began, in ns.
    """
    show_messages()
    hydra_config = HydraConfig.get()
    overrides = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    launcher = hydra_config.runtime.choices["hydra/launcher"]
    sweep = hydra_config.mode == RunMode.MULTIRUN
    parallel = sweep and launcher != "basic"
    Display.bars = not parallel
    outcome = Outcome(overrides, None, sweep)

    # A job in this process leaves signals to the command. Workers of submitit and torchrun handle them themselves.
    in_worker = parallel and launcher == "joblib"
    if in_worker:
        cores.others = 0.0  # the command has said what else runs; the load here has its other workers in it
    try:
        with stop_enabled(worker=True) if in_worker else stop_deferred([]):
            if stop_signal() is not None:
                raise Stopped
            # The whole configuration is checked before anything slow is read.
            config = checked_config(composed, overrides)
            if not config.dry_run:
                outcome.config = copy.deepcopy(config)
                outcome.ended(run(config, overrides, datasets_of(began)))
                return outcome
            require(not parallel, "dry_run=true looks at all jobs in one process: it needs hydra/launcher=basic.")
            if not sweep:
                log.info("All settings: the same command with --cfg job --resolve")
            if not planned:
                planned.append(Plan(runs=1))
            planned[0].add(config)
            Outcome.of_this_command.remove(outcome)
            return None
    except KeyboardInterrupt:
        outcome.state = "stopped"
        if planned:  # the plan says what it counts
            Outcome.of_this_command.remove(outcome)
        if not in_worker:  # it ends the sweep
            raise
    except InUse as error:  # a sweep in another shell has this run, which is no failure if there are others to do
        outcome.reason = str(error)
        if sweep and not devices.shared():
            outcome.state = "in progress"
            log.info(f"left to another process: {error}")
        else:
            log.error(str(error))
    except BrokenPipeError:  # nobody reads the output: the command ends; of an exception Hydra would tell
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        told = isinstance(error, UserError | OSError)  # OSError: a full disk, a folder that cannot be written
        if not told:  # an error of the program: its place helps
            traceback.print_exc()
        outcome.reason = in_words(error) if told else f"{type(error).__name__}: {error}"
        outcome.record = getattr(error, "record", None)
        outcome.unseen = parallel and launcher.startswith("submitit")
        log.error(outcome.reason)
    if devices.shared() and outcome.state != "stopped":
        sys.exit(1)  # the other processes wait for this one, and torchrun ends them
    return outcome  # the other jobs of a sweep go on


def without_finished(jobs: Jobs, datasets: dict[str, Dataset]) -> list[list[str]]:
    """The words of unfinished jobs. The finished ones end here, since a launch takes a quarter of a second.

    If processes share a run, each of them looks for itself at the same time.
    """
    lookup, left = Lookup(datasets), []
    for words, config in jobs.items():
        result = None if config.dry_run or devices.shared() else lookup.finished(config)
        if result is None:
            left.append(list(words))
        else:
            Outcome(list(words), config, of_sweep=True).ended(result)
    return left


def look_again(outcomes: Sequence[Outcome], datasets: dict[str, Dataset]) -> None:
    """Looks again at the runs of another process, which may have finished or left them meanwhile."""
    note_finished(outcomes, datasets)
    for outcome in outcomes:
        if outcome.state == "in progress" and outcome.config and stop_signal() is None:
            try:
                outcome.ended(run(copy.deepcopy(outcome.config), outcome.overrides, datasets))
            except InUse:
                continue
            except (UserError, OSError) as error:
                outcome.state, outcome.reason = "failed", in_words(error)
                outcome.record = getattr(error, "record", None)
                log.error(outcome.reason)


def note_finished(outcomes: Sequence[Outcome], datasets: dict[str, Dataset]) -> None:
    """Notes which runs of another process are finished by now."""
    lookup = Lookup(datasets)
    for outcome in outcomes:
        if outcome.state == "in progress" and outcome.config and (result := lookup.finished(outcome.config)):
            outcome.ended(result)


def table(outcomes: Sequence[Outcome]) -> Table:
    """Runs by state. Each run that was not made has a row: its own words, and the first line of the reason."""
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
    return Table("", ["state", "runs", "which", "reason"], rows, 1).without_empty()

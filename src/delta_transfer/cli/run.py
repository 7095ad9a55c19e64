"""delta-run: compose a configuration, check it, carry out the run. The road of a run is experiment/experiment.py."""

import os
import signal
import sys
from contextlib import nullcontext

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ..common import interrupts
from ..common.console import log, show_messages
from ..common.options import require
from ..engine import devices
from ..engine.config import RunConfig
from ..experiment.choosing import Made, ruled_out
from ..experiment.planning import Plan
from . import which_is_best
from .compose import check_overrides, check_values, hydra_raises, in_our_words, register_schemas, to_run_config
from .jobs import Outcome, run_job, show

register_schemas()  # on import, so that they are also there in the worker processes of a launcher


def main(config_name: str = "config") -> None:
    show_messages()
    Outcome.of_this_command.clear()
    interrupts.forget()
    if devices.shared() and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process speaks for all
    if "dry_run=true" in sys.argv:  # looks at all jobs in this process, whatever would launch them
        sys.argv = [word for word in sys.argv if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    command = sys.argv
    planned: list[Plan] = []

    @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
    def job(composed: DictConfig) -> Outcome | None:
        sys.argv = command  # a worker has another one, but the record calls this the run's command
        return run_job(composed, planned)

    def compose_first_job(words: list[str]) -> tuple[RunConfig, dict[str, str]]:
        """The configuration of the first of the jobs that a command has, and the parameters of its sweep."""
        found: list[tuple[RunConfig, dict[str, str]]] = []

        @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
        def first(composed: DictConfig) -> None:
            hydra_config = HydraConfig.get()
            check_overrides(hydra_config.overrides.task)
            config = to_run_config(composed)
            check_values(hydra_config.overrides.task, config)
            found.append((config, dict(hydra_config.sweeper.params)))

        sys.argv = [command[0], *words, "hydra.mode=RUN"]
        first()
        return found[0]

    def sweep(words: list[str]) -> list[Made]:
        """Carries out the jobs of another command as a part of this one, or plans them."""
        ended, seen = len(outcomes), len(planned[0].jobs) if planned else 0
        sys.argv = [command[0], "-m", *words]
        job()
        if interrupts.received() is not None:
            raise interrupts.Stopped
        jobs = planned[0].jobs[seen:] if planned else []
        return [(outcome.state, outcome.record) for outcome in outcomes[ended:]] + [(j.state, j.record) for j in jobs]

    outcomes = Outcome.of_this_command
    stopped_by, composed, verdict = None, True, []
    alone = not devices.shared()
    try:
        # Between its own jobs this process waits for workers. They get a terminal's Ctrl-C themselves, and end.
        with hydra_raises(), interrupts.stoppable() if alone else nullcontext(), interrupts.deferred([signal.SIGINT]):
            if which_is_best.asked_for(command[1:]):
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
        show(outcomes)
    for line in verdict:
        log.info(line)
    devices.leave()
    for plan_of_all in planned:
        plan_of_all.show()
    if (number := interrupts.received() or stopped_by) is not None:
        log.error(f"stopped by {signal.Signals(number).name}: the same command goes on where it was")
        sys.exit(128 + number)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if verdict:
        failed = [outcome for outcome in failed if not ruled_out(outcome.record)]
    sys.exit(0 if composed and not failed else 1)

"""delta-run: compose a configuration, check it, carry out the run. The run itself is in run.py.

torchrun --nproc-per-node=2 -m delta_transfer.train dataset=cub ...     one run on two GPUs
"""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .cli.outcomes import Outcome, show
from .common import interrupts
from .common.console import Display, log, show_messages
from .common.errors import UserError
from .common.options import require
from .config import RunConfig, check_values, register_schemas, to_run_config
from .experiment import choosing as which_is_best
from .records.locks import InUse

register_schemas()  # on import, so that they are also there in the worker processes of a launcher
SHARED = int(os.environ.get("WORLD_SIZE", "1")) > 1  # torchrun: this is one of several processes that make one run


def main(config_name: str = "config") -> None:
    show_messages()
    Outcome.of_this_command.clear()
    interrupts.forget()
    if SHARED and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process speaks for all
    if "dry_run=true" in sys.argv:  # looks at all jobs in this process, whatever would launch them
        sys.argv = [word for word in sys.argv if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    command, planned = sys.argv, []

    @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
    def job(composed: DictConfig) -> Outcome | None:
        sys.argv = command  # a worker has another one, but this is what the record calls its command
        return carry_out(composed, planned)

    def look(words: list[str]) -> tuple[RunConfig, dict]:
        """The configuration of the first of the jobs that a command has, and the parameters of its sweep."""
        found = []

        @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
        def first(composed: DictConfig) -> None:
            config, hydra_config = to_run_config(composed), HydraConfig.get()
            check_values(hydra_config.overrides.task, config)
            found.append((config, OmegaConf.to_container(hydra_config.sweeper.params)))

        sys.argv = [command[0], *words, "hydra.mode=RUN"]
        first()
        return found[0]

    def sweep(words: list[str]) -> list[which_is_best.Made]:
        """Carry out the jobs of another command as a part of this one, or plan them."""
        ended, seen = len(outcomes), len(planned[0].jobs) if planned else 0
        sys.argv = [command[0], "-m", *words]
        job()
        if interrupts.received() is not None:
            raise interrupts.Stopped
        jobs = planned[0].jobs[seen:] if planned else []
        return [(one.state, one.record) for one in (*outcomes[ended:], *jobs)]

    outcomes = Outcome.of_this_command
    stopped_by, composed, verdict = None, True, []
    try:
        # Outside of jobs of its own this process waits for workers. They get a terminal's Ctrl-C themselves, and end.
        with shown_by_us(), nullcontext() if SHARED else interrupts.stoppable(), interrupts.deferred([signal.SIGINT]):
            if which_is_best.asked_for(command[1:]):
                require(not SHARED, "+experiment=which_is_best makes many runs: start it without torchrun.")
                verdict = which_is_best.carry_out(command[1:], look, sweep)
            else:
                job()
    except KeyboardInterrupt:
        stopped_by = signal.SIGINT
    except Exception as error:  # Hydra's, of the configuration or a launcher: a job returns what happens in it
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        composed = False
        reason = "\n".join(str(e) for e in (error, error.__cause__) if e) or type(error).__name__
        if "schema/reg@reg" in reason:  # reg=[lwf,at]
            reason = "reg is one method: the sum of two is reg=sum +reg@reg.terms.lwf=lwf +reg@reg.terms.at=at."
        log.error(reason + hint_to_quote(error))
    for outcome in outcomes:
        if outcome.unseen:
            log.error(outcome.reason)
    if any(outcome.of_sweep for outcome in outcomes):
        show(outcomes)
    for line in verdict:
        log.info(line)
    if SHARED:
        from .engine.processes import leave

        leave()
    for plan_of_all in planned:
        plan_of_all.show()
    if (number := interrupts.received() or stopped_by) is not None:
        log.error(f"stopped by {signal.Signals(number).name}: the same command goes on where it was")
        sys.exit(128 + number)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if verdict:
        failed = [outcome for outcome in failed if not which_is_best.ruled_out(outcome.record)]
    sys.exit(0 if composed and not failed else 1)


def hint_to_quote(error: Exception) -> str:
    """For Hydra's message of a value that it takes for its grammar, as dataset.root=photos (1)."""
    if not isinstance(error, HydraException) or "Unknown function" not in str(error):
        return ""
    return "\nA value with brackets is quoted twice, once for the shell: \"dataset.root='photos (1)'\""


@contextmanager
def shown_by_us() -> Iterator[None]:
    """Hydra raises what goes wrong in it, as it does where a person asked for HYDRA_FULL_ERROR, and prints nothing."""
    asked = "HYDRA_FULL_ERROR" in os.environ
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        yield
    finally:
        if not asked:
            del os.environ["HYDRA_FULL_ERROR"]


def carry_out(composed: DictConfig, planned: list) -> Outcome | None:
    """One job, in this process or in a launcher's worker."""
    show_messages()  # in a worker, too
    hydra_config = HydraConfig.get()
    launcher = hydra_config.runtime.choices["hydra/launcher"]
    sweep = hydra_config.mode == RunMode.MULTIRUN
    parallel = sweep and launcher != "basic"
    Display.bars = not parallel

    def ended(state: str, reason: str = "", unseen: bool = False, record: dict | None = None) -> Outcome:
        return Outcome(list(hydra_config.overrides.task), state, reason, unseen, of_sweep=sweep, record=record)

    # A job in this process leaves signals to `main`. submitit's workers and torchrun have ways of their own.
    in_worker = parallel and launcher == "joblib"
    try:
        with interrupts.stoppable(worker=True) if in_worker else interrupts.deferred([]):
            if interrupts.received() is not None:
                raise interrupts.Stopped
            # The whole configuration is checked before anything slow is imported or read.
            config = to_run_config(composed)
            check_values(hydra_config.overrides.task, config)
            if not config.dry_run:
                done = execute(config)
                return ended("skipped" if done.skipped else "done", str(done), record=done.summary)
            require(not parallel, "dry_run=true looks at all jobs in one process: it needs hydra/launcher=basic.")
            if not sweep:
                log.info(OmegaConf.to_yaml(composed, resolve=True))
            plan(config, planned)
            return None
    except KeyboardInterrupt:
        outcome = ended("stopped")
        if not in_worker:  # which ends the sweep
            raise
        return outcome
    except InUse as error:  # a sweep in another shell has this one: no failure, if there are others to do
        log.error(str(error))
        if SHARED:
            sys.exit(1)
        return ended("in work" if sweep else "failed", str(error))
    except Exception as error:
        told = isinstance(error, (UserError, OSError))  # OSError: a full disk, a folder that cannot be written
        if not told:  # something is wrong with the program: where is what helps
            traceback.print_exc()
        message = str(error) if told else f"{type(error).__name__}: {error}"
        log.error(message)
        if SHARED:
            sys.exit(1)  # the other processes wait for this one: torchrun ends them
        # The other jobs of a sweep go on.
        unseen = parallel and launcher.startswith("submitit")
        return ended("failed", message, unseen, record=getattr(error, "record", None))


def execute(config: RunConfig):
    """The run.Ended of the run that `config` describes."""
    from .experiment.sources import sources_of, with_weights

    backbones = [config.backbone, *(source.backbone for source in sources_of(config.source))]
    if embedded := [backbone for backbone in backbones if backbone.weights == "glyphs"]:
        from .experiment.pretraining import glyphs_weights
        from .records.locks import wait_for_lock

        # Of several workers one trains the network, the others wait for it; under torchrun all train it together.
        folder = Path(config.results_dir) / "pretrained"
        folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if SHARED else wait_for_lock(folder / ".lock", "trains the source network"):
            for backbone in embedded:
                file = glyphs_weights(config, backbone.name)
        config.source = with_weights(config.source, "glyphs", file)
        if config.backbone.weights == "glyphs":
            config.backbone.weights = file

    from .experiment.experiment import run  # imports torch

    return run(config, overrides=HydraConfig.get().overrides.task)


def plan(config: RunConfig, planned: list) -> None:
    """Add a job to the one Plan in `planned`, which is made with the first."""
    from .experiment.planning import Plan  # imports torch

    if not planned:
        planned.append(Plan())
    planned[0].add(config)


if __name__ == "__main__":
    from .train import main  # by the name under which workers import it

    main()

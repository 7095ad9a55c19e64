"""delta-run: compose a configuration, check it, carry out the run. The run itself is in run.py.

torchrun --nproc-per-node=2 -m delta_transfer.train dataset=cub ...     one run on two GPUs
"""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .config import RunConfig, check_values, register_schemas, require, to_run_config
from .console import Display, complain, say
from .errors import UserError

register_schemas()  # on import, so that they are also there in the worker processes of a launcher
SHARED = int(os.environ.get("WORLD_SIZE", "1")) > 1  # torchrun: this is one of several processes that make one run


def main(config_name: str = "config") -> None:
    Failure.of_this_command.clear()
    if SHARED and os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process speaks for all
    if "dry_run=true" in sys.argv:  # looks at all jobs in this process, whatever would launch them
        sys.argv = [word for word in sys.argv if not word.startswith(("hydra/launcher=", "hydra.launcher."))]
    command, planned = sys.argv, []

    @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
    def job(composed: DictConfig) -> "Failure | None":
        sys.argv = command  # a worker has another one, but this is what the record calls its command
        return carry_out(composed, planned)

    try:
        job()
    finally:  # also when Hydra ends the program, because of an exception that is none of ours
        for failure in Failure.of_this_command:
            if failure.unseen:
                complain(failure.message)
    if SHARED:
        from .distributed import leave

        leave()
    for plan_of_all in planned:
        plan_of_all.show()
    sys.exit(1 if Failure.of_this_command else 0)


class Failure:
    """What a failed job returns; `of_this_command` has all of them, wherever the jobs ran.

    A job that raised would end a sweep: Hydra's sweeper reports the first exception and starts no further batch. What
    jobs return it shows to nobody. But a return value is either made in this process or, when a launcher's worker sends
    it, unpickled here: both are noted.
    """

    of_this_command: "list[Failure]" = []

    def __init__(self, message: str, unseen: bool):
        self.message, self.unseen = message, unseen  # unseen: a worker wrote it into a file
        self.of_this_command.append(self)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.of_this_command.append(self)


def carry_out(composed: DictConfig, planned: list) -> Failure | None:
    """One job, in this process or in a launcher's worker."""
    launcher = HydraConfig.get().runtime.choices["hydra/launcher"]
    parallel = HydraConfig.get().mode == RunMode.MULTIRUN and launcher != "basic"
    Display.bars = not parallel
    try:
        # The whole configuration is checked before anything slow is imported or read.
        config = to_run_config(composed)
        check_values(HydraConfig.get().overrides.task)
        if config.dry_run:
            require(not parallel, "dry_run=true looks at all jobs in one process: it needs hydra/launcher=basic.")
            if HydraConfig.get().mode == RunMode.RUN:
                say(OmegaConf.to_yaml(composed, resolve=True))
            plan(config, planned)
        else:
            execute(config)
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        complain(str(error))
        if SHARED:
            sys.exit(1)  # the other processes wait for this one: torchrun ends them
        # The other jobs of a sweep go on.
        return Failure(str(error), unseen=parallel and launcher.startswith("submitit"))


def execute(config: RunConfig) -> None:
    if config.backbone.weights == "glyphs":
        from .data.locks import held
        from .embedded import glyphs_weights

        # Of several workers one trains the network, the others wait for it; under torchrun all train it together.
        folder = Path(config.results_dir) / "pretrained"
        folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if SHARED else held(folder / ".lock", "trains the source network"):
            config.backbone.weights = glyphs_weights(config)

    from .run import run  # imports torch

    run(config, overrides=HydraConfig.get().overrides.task)


def plan(config: RunConfig, planned: list) -> None:
    """Add a job to the one Plan in `planned`, which is made with the first."""
    from .plan import Plan  # imports torch

    if not planned:
        planned.append(Plan())
    planned[0].add(config)


if __name__ == "__main__":
    from delta_transfer.train import main  # by the name under which workers import it

    main()

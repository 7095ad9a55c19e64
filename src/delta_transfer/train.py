"""delta-run: compose a configuration, check it, carry out the run. The run itself is in run.py."""

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from .config import RunConfig, check_values, register_schemas, to_run_config
from .console import complain, say
from .errors import UserError


def main(config_name: str = "config") -> None:
    failures, planned = 0, []

    @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
    def job(composed: DictConfig) -> None:
        nonlocal failures
        try:
            # The whole configuration is checked before anything slow is imported or read.
            config = to_run_config(composed)
            check_values(HydraConfig.get().overrides.task)
            if config.dry_run:
                if HydraConfig.get().mode == RunMode.RUN:
                    say(OmegaConf.to_yaml(composed, resolve=True))
                plan(config, planned)
            else:
                execute(config)
        except (UserError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            # The other jobs of a sweep go on.
            failures += 1
            complain(str(error))

    register_schemas()
    job()
    for plan_of_all in planned:
        plan_of_all.show()
    sys.exit(1 if failures else 0)


def execute(config: RunConfig) -> None:
    if config.backbone.weights == "glyphs":
        from .embedded import glyphs_weights

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
    main()

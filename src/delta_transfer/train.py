"""delta-run: compose a configuration, check it, carry out the run. The run itself is in run.py."""

import os
import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from .config import register_schemas, to_run_config
from .console import complain, say
from .errors import UserError


def main(config_name: str = "config") -> None:
    failures = 0

    @hydra.main(version_base="1.3", config_path="pkg://delta_transfer.conf", config_name=config_name)
    def job(composed: DictConfig) -> None:
        nonlocal failures
        try:
            execute(composed)
        except UserError as error:
            if os.environ.get("HYDRA_FULL_ERROR"):
                raise
            # The other jobs of a sweep go on.
            failures += 1
            complain(str(error))

    register_schemas()
    job()
    sys.exit(1 if failures else 0)


def execute(composed: DictConfig) -> None:
    """One job: check the whole configuration before anything slow is imported or read."""
    config = to_run_config(composed)
    if config.dry_run:
        say(OmegaConf.to_yaml(composed, resolve=True))
        return
    if config.backbone.weights == "glyphs":
        from .embedded import glyphs_weights

        config.backbone.weights = glyphs_weights(config)

    from .run import run  # imports torch

    run(config)


if __name__ == "__main__":
    main()

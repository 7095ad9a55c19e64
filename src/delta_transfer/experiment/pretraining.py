"""The source network of the embedded default: trained by the recipe of conf/pretrain.yaml when it is first needed."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hydra import compose

from ..common.console import log
from ..common.errors import UserError
from ..common.options import require
from ..config import RunConfig, to_run_config
from ..records.locks import InUse

if TYPE_CHECKING:
    from .experiment import RunResult

    pass

WEIGHTS = "model.safetensors"


def glyphs_weights(config: RunConfig, network: str) -> str:
    """Path of the weights of the embedded source network, trained now if that was not done before.

    Raises UserError if it cannot be; tried once per command.
    """
    path, why_not = _glyphs_weights(*_asked_for(config, network))
    require(why_not is None, f"Source network of the embedded default: {why_not}")
    return path


def trained_glyphs_weights(config: RunConfig, network: str) -> str | None:
    """The same path if the network has been trained; nothing is trained."""
    from ..data import load_dataset
    from ..engine.devices import pick_device, pick_precision
    from .experiment import name_of

    recipe = _recipe(*_asked_for(config, network))
    recipe.precision = pick_precision(recipe.precision, pick_device(recipe.device))
    name = name_of(recipe, load_dataset(recipe.dataset).fingerprint, weights="none")
    path = Path(recipe.results_dir) / "runs" / name
    return str(path / WEIGHTS) if (path / "summary.json").exists() else None


def _asked_for(config: RunConfig, network: str) -> tuple:
    return network, config.results_dir, config.cache_dir, config.device, config.retry_failed


@cache  # once per sweep
def _glyphs_weights(*asked_for) -> tuple[str, None] | tuple[None, str]:
    """The path, or why there is none."""
    from ..records.checked import load_with_checksum
    from .experiment import run

    recipe = _recipe(*asked_for)
    log.info("Source network of the embedded default (delta-pretrain):")
    try:
        folder = Path(recipe.results_dir) / "runs" / _when_free(lambda: run(recipe)).summary["run_id"]
        try:
            load_with_checksum(folder / WEIGHTS)
        except (ValueError, OSError) as error:
            log.info(f"{folder / WEIGHTS} is damaged ({error}): it is trained again")
            (folder / "summary.json").unlink()
            _when_free(lambda: run(recipe))
    except UserError as error:
        return None, str(error)
    return str(folder / WEIGHTS), None


def _when_free(make: "Callable[[], RunResult]") -> "RunResult":
    """Waits while another process, such as a delta-pretrain, makes it."""
    told = False
    while True:
        try:
            return make()
        except InUse as error:
            if not told:
                log.info(f"{error}: waiting")
            told = True
            time.sleep(5)


def _recipe(backbone: str, results_dir: str, cache_dir: str, device: str, retry_failed: bool) -> RunConfig:
    recipe = to_run_config(compose("pretrain"))  # within the Hydra job that asks for it
    require(
        backbone == recipe.backbone.name,
        f"backbone.weights=glyphs exists for {recipe.backbone.name} only, not for {backbone}.",
    )
    recipe.results_dir = str(Path(results_dir) / "pretrained")
    recipe.cache_dir, recipe.device, recipe.retry_failed = cache_dir, device, retry_failed
    return recipe

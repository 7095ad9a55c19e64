"""The source network of the embedded default: trained by the recipe of conf/pretrain.yaml when it is first needed."""

from functools import cache
from pathlib import Path

from hydra import compose

from .config import RunConfig, require, to_run_config
from .console import say

WEIGHTS = "model.safetensors"


def glyphs_weights(config: RunConfig) -> str:
    """Path of the weights of the embedded source network, trained now if that was not done before."""
    return _glyphs_weights(*_asked_for(config))


def trained_glyphs_weights(config: RunConfig) -> str | None:
    """The same path if the network has been trained; nothing is trained."""
    from .data import load_dataset
    from .environment import pick_device, pick_precision
    from .run import name_of

    recipe = _recipe(*_asked_for(config))
    recipe.precision = pick_precision(recipe.precision, pick_device(recipe.device))
    name = name_of(recipe, load_dataset(recipe.dataset, Path(recipe.cache_dir)), weights="none")
    path = Path(recipe.results_dir) / "runs" / name
    return str(path / WEIGHTS) if (path / "summary.json").exists() else None


def _asked_for(config: RunConfig) -> tuple:
    return config.backbone.name, config.results_dir, config.cache_dir, config.device, config.retry_failed


@cache  # once per sweep
def _glyphs_weights(*asked_for) -> str:
    from .run import run

    recipe = _recipe(*asked_for)
    say("Source network of the embedded default (delta-pretrain):")
    summary = run(recipe).summary
    return str(Path(recipe.results_dir) / "runs" / summary["run_id"] / WEIGHTS)


def _recipe(backbone: str, results_dir: str, cache_dir: str, device: str, retry_failed: bool) -> RunConfig:
    recipe = to_run_config(compose("pretrain"))  # within the Hydra job that asks for it
    require(
        backbone == recipe.backbone.name,
        f"backbone.weights=glyphs exists for {recipe.backbone.name} only, not for {backbone}.",
    )
    recipe.results_dir = str(Path(results_dir) / "pretrained")
    recipe.cache_dir, recipe.device, recipe.retry_failed = cache_dir, device, retry_failed
    return recipe

"""The source network of the embedded default: trained by the recipe of conf/pretrain.yaml when it is first needed."""

from functools import cache
from pathlib import Path

from hydra import compose

from .config import RunConfig, require, to_run_config
from .console import say


def glyphs_weights(config: RunConfig) -> str:
    """Path of the weights of the embedded source network, trained now if that was not done before."""
    return _glyphs_weights(config.backbone.name, config.results_dir, config.cache_dir, config.device)


@cache  # once per sweep
def _glyphs_weights(backbone: str, results_dir: str, cache_dir: str, device: str) -> str:
    from .run import run

    recipe = to_run_config(compose("pretrain"))  # within the Hydra job that asks for it
    require(
        backbone == recipe.backbone.name,
        f"backbone.weights=glyphs exists for {recipe.backbone.name} only, not for {backbone}.",
    )
    recipe.results_dir = str(Path(results_dir) / "pretrained")
    recipe.cache_dir, recipe.device = cache_dir, device
    say("Source network of the embedded default (delta-pretrain):")
    summary = run(recipe)
    return str(Path(recipe.results_dir) / "runs" / summary["run_id"] / "model.safetensors")

"""delta-pretrain: train a source network. It is an ordinary run (conf/pretrain.yaml) from random weights."""

from pathlib import Path

from hydra import compose, initialize_config_module

from .config import RunConfig, require, to_run_config
from .console import say


def glyphs_weights(config: RunConfig) -> str:
    """Path of the weights of the embedded source network, trained now if that was not done before."""
    from .run import run

    with initialize_config_module("delta_transfer.conf", version_base="1.3"):
        recipe = to_run_config(compose("pretrain"))
    require(
        config.backbone.name == recipe.backbone.name,
        f"backbone.weights=glyphs exists for {recipe.backbone.name} only, not for {config.backbone.name}.",
    )
    recipe.results_dir = str(Path(config.results_dir) / "pretrained")
    recipe.cache_dir, recipe.device = config.cache_dir, config.device
    say("Source network of the embedded default (delta-pretrain):")
    summary = run(recipe)
    return str(Path(recipe.results_dir) / "runs" / summary["run_id"] / "model.safetensors")


def main() -> None:
    from .train import main as run_main

    run_main("pretrain")


if __name__ == "__main__":
    main()

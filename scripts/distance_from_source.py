"""How far are the study's data sets from what the source network knows? Its confidence on their training images.

    python scripts/distance_from_source.py --data DIR --weights RESNET18 [--output FILE.json] [WORD ...]

The confidence of an image is the largest softmax probability of the source's own head. It is low on images that are
unlike those that the network was trained on (Hendrycks and Gimpel, A Baseline for Detecting Misclassified and
Out-of-Distribution Examples in Neural Networks, ICLR 2017). The table has its mean in percent over the training images
of each data set; read_study.py takes the file as --confidence.
"""

import argparse
import json
from pathlib import Path

import torch

from delta_transfer.cli.compose import compose_config
from delta_transfer.data import load_dataset
from delta_transfer.data.dataset import make_splits
from delta_transfer.engine.devices import pick_device
from delta_transfer.engine.tasks import TASKS, outputs_of
from delta_transfer.models.zoo import build_source
from delta_transfer.records.files import write_atomically
from read_study import table
from when_does_it_help import DATASETS, PROTOCOL


def confidence(words: list[str]) -> tuple[str, int, float]:
    """The name of a data set, the number of its training images, and the source's mean confidence on them in %."""
    config = compose_config("config", words)
    device = pick_device(config.device)
    dataset = load_dataset(config.dataset, Path(config.cache_dir))
    train = make_splits(dataset, config.dataset, config.split, config.seed).train
    source = build_source(config.backbone, config.seed).to(device).freeze()
    logits, _ = outputs_of(source, TASKS[config.task].open_loader(config, dataset, device), train, "logits")
    return config.dataset.name, len(train), 100 * torch.softmax(logits, dim=1).amax(dim=1).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="words of delta-run that replace those of the study's protocol")
    parser.add_argument("--data", required=True, help="folder that holds cub50, dtd10, ...")
    parser.add_argument("--weights", required=True, help="weights of ResNet-18")
    parser.add_argument("--output", type=Path, help="JSON file for the confidence by data set")
    arguments = parser.parse_args()
    found = [
        confidence([PROTOCOL, *of_data, f"backbone.weights={arguments.weights}", *arguments.words])
        for name, words in DATASETS.items()
        if name.endswith("_10") and (of_data := words.format(data=arguments.data).split())
    ]
    found.sort(key=lambda one: one[2])
    header = ["data set", "training images", "confidence of the source, %"]
    print(table(header, ([name, count, f"{mean:.1f}"] for name, count, mean in found)))
    if arguments.output:
        content = json.dumps({name: mean for name, _, mean in found}, indent=2) + "\n"
        write_atomically(arguments.output, content.encode())


if __name__ == "__main__":
    main()

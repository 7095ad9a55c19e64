"""Two backbones on two data sets of photographs: EfficientNet-Lite0 and ResNet-18, five methods, five seeds.

    python scripts/backbones_table.py --data DIR --resnet18 resnet18.safetensors [--results DIR] [--only NAME,...]

The images are those of hymenoptera (2 classes) and of dtd10 (10 classes), 20 training images of each class, at 224
pixels; a run has 80 iterations of 8 images. ResNet-18 computes in bf16, which is twice as fast on a CPU that has it;
EfficientNet-Lite0 computes in fp32, since its depthwise convolutions are slower in bf16. DELTA's attention is the
first-order estimate. Each pair of data set and backbone has a folder of results. The script tries every strength on two
folds of the training images, adds decades until the best is not at an edge, and then trains with the best on all of
them. No test image takes part in a choice. The command resumes: finished runs are skipped.
"""

import argparse
from pathlib import Path

from studies import ON_FOLDS, Study

SEEDS = 5
DATASETS = ("hymenoptera", "dtd10")
METHODS = ("l2", "l2_fe", "delta_noatt", "l2_sp", "delta")
STRENGTHS = {"delta_noatt": (-4, -3, -2), "l2_sp": (-3, -2, -1), "delta": (-4, -3, -2)}  # decades of alpha
LIMITS = (-8, 2)
BESIDE = {"delta": ["reg.attention.method=taylor"]}  # exact attention takes 30 to 45 minutes of a core for 200 images
PROTOCOL = "dataset.images_per_class=20 backbone.image_size=224 backbone.resize=256 schedule=quick"
LENGTH = "schedule.iterations=80 schedule.batch_size=8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that holds hymenoptera and dtd10")
    parser.add_argument("--resnet18", required=True, help="file of weights; the other network's are in a package")
    parser.add_argument("--results", type=Path, default=Path("results/backbones_table"))
    parser.add_argument("--only", help="names such as dtd10-resnet18, in order (default: all four)")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, in order (default: all)")
    arguments = parser.parse_args()
    backbones = {
        "resnet18": ["backbone=resnet18", "precision=bf16", f"backbone.weights={arguments.resnet18}"],
        "efficientnet_lite0": ["backbone=efficientnet_lite0"],
    }
    every = [f"{dataset}-{backbone}" for dataset in DATASETS for backbone in backbones]
    for name in arguments.only.split(",") if arguments.only else every:
        dataset, backbone = name.split("-")
        images = ["dataset=folder", f"dataset.root={arguments.data}/{dataset}", f"dataset.name={dataset}"]
        words = [*images, *backbones[backbone], *PROTOCOL.split(), *LENGTH.split()]
        study = Study(words, arguments.results / name, ON_FOLDS, STRENGTHS, LIMITS, BESIDE)
        for method in arguments.methods.split(","):
            study.final(method, SEEDS)


if __name__ == "__main__":
    main()

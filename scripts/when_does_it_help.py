"""The study of when regularised fine-tuning helps: several data sets, methods, strengths on folds, five seeds.

    python scripts/when_does_it_help.py --data DIR --weights FILE [--results DIR] [--only NAME,...] [WORD ...]

Each data set has a folder of results. The script first tries every strength on two folds of the training images, adds
decades until the best is not at an edge, and then trains with the best on all training images with five seeds. No test
image takes part in a choice. The command resumes: finished runs are skipped, and a finished study takes a minute. The
most important runs of a data set come first, so that a stopped study has a table. Final runs also measure forgetting:
on how many test images the source's own head still says the same. WORDs of delta-run change the protocol of all runs:
`backbone.image_size=128 schedule.batch_size=16 precision=fp32` suits a CPU without bf16.
"""

import argparse
from pathlib import Path

from studies import ON_FOLDS, Study

PROTOCOL = "+experiment=when_does_it_help"
SEEDS = 5
BIRDS = "dataset=cub dataset.root={data}/cub50"
TEXTURES = "dataset=folder dataset.root={data}/dtd10 dataset.name=dtd10"
CIFAR10 = "dataset=folder dataset.root={data}/cifar10-part dataset.name=cifar10-part"
FEW, MANY = " dataset.images_per_class=3", " dataset.images_per_class=30"  # the protocol has 10
DATASETS = {  # name: the words that name the images, below --data
    "cub50_10": BIRDS,
    "dtd10_10": TEXTURES,
    "hymenoptera_10": "dataset=folder dataset.root={data}/hymenoptera dataset.name=hymenoptera",
    "caltech50_10": "dataset=caltech101 dataset.root={data}/caltech101-half dataset.train_per_class=10",
    "cifar10_10": CIFAR10,
    "dtd10_3": TEXTURES + FEW,
    "cub50_30": BIRDS + MANY,
    "dtd10_30": TEXTURES + MANY,
    "cifar10_3": CIFAR10 + FEW,
    "cifar10_30": CIFAR10 + MANY,
    "cub50_3": BIRDS + FEW,
    "dtd10_10-efficientnet_lite0": TEXTURES,
    "cub50_10-efficientnet_lite0": BIRDS,
}
# at most 100 training images: 150 iterations
SMALL = ("dtd10_10", "hymenoptera_10", "cifar10_10", "dtd10_3", "cifar10_3")
LITE0 = ("backbone=efficientnet_lite0", "precision=fp32")  # depthwise convolutions are slower in bf16
STRENGTHS = {  # decades of alpha
    "delta_noatt": (-4, -3, -2),
    "delta": (-4, -3, -2),
    "l2_sp": (-3, -2, -1),
    "ldifs": (0, 1, 2),
    "spd": (-1, 0, 1),
}
LIMITS = (-7, 3)
METHODS = ("l2", "l2_fe", "delta_noatt", "delta", "l2_sp", "stochnorm", "lp_ft", "ldifs", "spd", "bitfit")
FORGETTING = "evaluate.forgetting=true"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="words of delta-run that replace those of the study's protocol")
    parser.add_argument("--data", required=True, help="folder that holds cub50, dtd10, ...")
    parser.add_argument("--weights", required=True, help="weights of ResNet-18")
    parser.add_argument("--results", type=Path, default=Path("results/when_does_it_help"))
    parser.add_argument("--only", default=",".join(DATASETS), help="names of data sets, in order (default: all)")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, in order (default: all)")
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        words = [word.format(data=arguments.data) for word in DATASETS[name].split()]
        images, _, other = name.partition("-")
        if images in SMALL:
            words.append("schedule.iterations=150")
        network = LITE0 if other else [f"backbone.weights={arguments.weights}"]
        words = [PROTOCOL, *words, *network, *arguments.words]
        study = Study(words, arguments.results / name, ON_FOLDS, STRENGTHS, LIMITS)
        for method in arguments.methods.split(","):
            study.final(method, SEEDS, FORGETTING)


if __name__ == "__main__":
    main()

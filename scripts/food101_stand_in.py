"""A stand-in for Food-101: as many JPEGs in the publisher's layout, small and of made-up dishes.

    python scripts/food101_stand_in.py --output DIR [--fraction 0.1] [--side 64]
    delta-run dataset=food101 data_dir=DIR backbone=small_resnet backbone.weights=none reg=l2

It shows the cost of a large data set before the first step: listing, verifying, decoding. --fraction writes that part
of the images of each class. Each dish has a colour, so that there is something to learn; each image has its own
pattern. The command goes on where it stopped: classes that are there are kept.
"""

import argparse
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from delta_transfer.common.cores import USABLE

CLASSES, TRAIN, TEST = 101, 750, 250  # of the published data set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder that gets food-101/")
    parser.add_argument("--fraction", type=float, default=1.0, help="part of the images of each class (default: all)")
    parser.add_argument("--side", type=int, default=64, help="longer side of an image in pixels (default: 64)")
    options = parser.parse_args()
    if not 0 < options.fraction <= 1:
        parser.error("--fraction must be above 0 and at most 1")
    train, test = (max(1, round(options.fraction * count)) for count in (TRAIN, TEST))
    root = options.output / "food-101"
    classes = [f"dish_{number:03d}" for number in range(CLASSES)]
    with ProcessPoolExecutor(USABLE) as pool:
        list(pool.map(partial(write_class, root / "images", train + test, options.side), range(CLASSES), classes))
    (root / "meta").mkdir(exist_ok=True)
    for name, numbers in (("train", range(train)), ("test", range(train, train + test))):
        listed = {dish: [f"{dish}/{number:06d}" for number in numbers] for dish in classes}
        (root / "meta" / f"{name}.json").write_text(json.dumps(listed))
    (root / "meta" / "classes.txt").write_text("\n".join(classes) + "\n")
    print(f"{CLASSES * (train + test):,} images of {CLASSES} dishes in {root}")


def write_class(images: Path, count: int, side: int, number: int, dish: str) -> None:
    """Writes the images of a dish into a folder that gets its name when it is whole."""
    if (images / dish).exists():
        return
    unfinished = images / f".{dish}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    draw = np.random.default_rng(number)
    colour = draw.integers(60, 196, 3)
    for index in range(count):
        pattern = (colour + draw.normal(0, 40, (6, 8, 3))).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(pattern).resize((side, 3 * side // 4), Image.Resampling.BICUBIC)
        image.save(unfinished / f"{index:06d}.jpg", quality=85)
    unfinished.rename(images / dish)


if __name__ == "__main__":
    main()

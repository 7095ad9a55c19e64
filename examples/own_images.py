"""Images of your own, from a folder to a network that classifies new ones, in four steps.

    python examples/own_images.py photos                      # photos/ant/*.jpg, photos/bee/*.jpg, ...

The runs are those of delta-run, with records in results/runs: `delta-report` compares them.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from delta_transfer import fine_tune

# 1. The settings: a small network and a short schedule for a laptop. Take resnet50 and schedule="own" on a GPU.
NETWORK = {"backbone": "resnet18", "schedule": "quick"}


def main(folder: str, **more) -> dict[str, float]:
    # 2. Two methods: plain fine-tuning, and DELTA without attention. A fifth of the images is held out for testing,
    #    unless the folder has a test split.
    plain = fine_tune(folder, method="l2", **NETWORK, **more)
    delta = fine_tune(folder, method="delta_noatt", **NETWORK, **more)

    # 3. Their accuracies on the same test images, in percent. One seed cannot tell a difference of a few points from
    #    chance: `delta-run -m ... seed='range(5)'` and `delta-report` do.
    accuracies = {"L2": plain.record["test_top1"], "DELTA w/o ATT": delta.record["test_top1"]}
    print(accuracies)

    # 4. The network on a new image: here the first of the folder. `delta-predict` prepares images as the run did.
    backbone = delta.record["config"]["backbone"]
    path = next(p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    side = backbone["image_size"]
    pixels = np.asarray(Image.open(path).convert("RGB").resize((side, side)), np.float32) / 255
    image = torch.from_numpy((pixels - backbone["mean"]) / backbone["std"]).float().permute(2, 0, 1)
    best = delta.network(image[None])["logits"].softmax(1)[0]
    print(f"{path}: {delta.class_names[best.argmax()]} ({best.max():.0%})")
    return accuracies


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "photos")

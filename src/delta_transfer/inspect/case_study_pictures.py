"""The pictures of a case study and their captions.

Pictures of single images illustrate; they are no evidence, and their captions say how the images were picked. Grad-CAM
is that of the package grad-cam. Everything is computed from the runs' own networks (replay.py).
"""

from collections.abc import Iterator

import numpy as np
import torch
from matplotlib.figure import Figure

from ..common.console import log
from ..records.reading import transfers
from . import learned_attention
from .case_study import (
    Seen,
    ShownSource,
    disagreements,
    places_of,
    predictions_of,
    source_seen,
    sources_shown,
    target_seen,
    tidy,
)
from .image_maps import overlaid
from .replay import Replay

Picture = tuple[str, Figure, str]  # the stem of its file's name, the figure, the caption


def pictures(runs: list[Replay], labels: list[str], chosen: list[int] | None, count: int) -> Iterator[Picture]:
    """One picture of the test images `chosen` by their data set index, or one for each kind of disagreement.

    Args:
        labels: of the runs. The first two, A and B, are searched for images on which they disagree.
        chosen: None for `count` images of each kind of disagreement.
    """
    found = [predictions_of(run) for run in runs]
    sources, salient = sources_shown(runs), any(transfers(run.record) for run in runs)
    if chosen is not None:
        kinds = {"chosen": places_of(chosen, found[0].index)}
    else:
        kinds = disagreements(found[0], found[1])
    for stem, places in kinds.items():
        if len(places) == 0:
            log.info(f"{stem}: there is no such image, so no picture")
            continue
        shown = places if chosen is not None else places[:count]
        index = found[0].index[shown]
        images = torch.cat(list(runs[0].images(index)))
        networks = [source_seen(source, images, runs[0].config.backbone, salient) for source in sources]
        for run, label, made in zip(runs, labels, found, strict=True):
            networks.append(target_seen(run, label, made, shown, images, salient))
        figure = draw(runs[0].pixels(images), titles_of(runs[0], index), networks)
        if chosen is not None:
            picked = "Test images, chosen by hand."
        else:
            picked = how_picked(stem, kinds, labels, len(found[0].labels), len(shown))
        yield stem, figure, f"{picked} {how_made(runs[0], sources, salient)}"


def attention_pictures(run: Replay, label: str, chosen: list[int] | None, count: int) -> Iterator[Picture]:
    """A picture for each stage of a run that has attention modules of its own; none for other runs."""
    if not learned_attention.has_modules(run):
        return
    test = run.splits.test
    if chosen is None:
        index, picked = test[:count], "The first test images of the data set."
    else:
        index, picked = test[places_of(chosen, test)], "Test images, chosen by hand."
    images = torch.cat(list(run.images(index)))
    for stage in learned_attention.attended(run, images):
        figure = learned_attention.figure_of(run.pixels(images), titles_of(run, index), stage)
        caption = learned_attention.caption(stage, picked)
        yield f"attention-{run.run_id}-stage{stage.stage}", figure, f"{label}. {caption}"


def titles_of(run: Replay, index: np.ndarray) -> list[str]:
    return [f"{tidy(run.dataset.classes[run.dataset.labels[i]])}\n(image {i})" for i in index]


def draw(pixels: np.ndarray, left: list[str], networks: list[Seen]) -> Figure:
    """A row for each image: the image, then the maps of each network.

    `pixels` (N, H, W, 3) in 0..1; `left` is the text below each image.
    """
    side, inner, outer, text, head = 1.3, 0.06, 0.3, 0.5, 0.5  # inches
    rows, shown = len(pixels), len(networks[0].maps)
    wide = shown * side + (shown - 1) * inner
    width = outer + side + len(networks) * (outer + wide) + outer
    height = head + rows * (side + text) + 0.3
    figure = Figure(figsize=(width, height))

    def show(images: list[np.ndarray], x: float, row: int, below: str, above: str) -> None:
        bottom = height - head - row * (side + text) - side
        for number, image in enumerate(images):
            at = (x + number * (side + inner), bottom, side, side)
            panel = figure.add_axes((at[0] / width, at[1] / height, at[2] / width, at[3] / height))
            panel.imshow(image, interpolation="nearest")
            panel.set_axis_off()
        middle = (x + (len(images) * (side + inner) - inner) / 2) / width
        figure.text(middle, (bottom - 0.05) / height, below, ha="center", va="top", fontsize=7.5, parse_math=False)
        if row == 0:
            figure.text(middle, (bottom + side + 0.06) / height, above, ha="center", va="bottom", fontsize=8.5)

    for row in range(rows):
        show([pixels[row]], outer, row, left[row], "test image\nand its class")
        for number, seen in enumerate(networks):
            heat = [overlaid(pixels[row], m[row]) for m in seen.maps.values()]
            x = 2 * outer + side + number * (outer + wide)
            verdict = {True: "✓ right:\n", False: "✗ wrong:\n", None: "of its own classes:\n"}[seen.verdicts[row]]
            show(heat, x, row, verdict + seen.texts[row], f"{seen.label}\n{'  |  '.join(seen.maps)}, {seen.classes}")
    scale = "Maps lie over the image in grey. Dark: the lowest value of each map, bright: its highest."
    figure.text(0.5, 0.1 / height, scale, ha="center", va="bottom", fontsize=7.5, color="#555555")
    return figure


def how_picked(stem: str, kinds: dict[str, np.ndarray], labels: list[str], tested: int, shown: int) -> str:
    a, b = labels[:2]
    right, wrong = (b, a) if stem == "b_right_a_wrong" else (a, b)
    other = next(kind for kind in kinds if kind != stem)
    return (
        f"Test images that {right} takes for the right class and {wrong} does not: {shown} of {len(kinds[stem]):,}. "
        f"The reverse is true of {len(kinds[other]):,}, of {tested:,} test images (the discordant counts of McNemar's "
        "test). Picked for the largest difference between the two in the probability of the true class: they "
        "illustrate what the maps can look like and are no evidence for either method."
    )


def how_made(run: Replay, sources: list[ShownSource], salient: bool) -> str:
    backbone, crops = run.config.backbone, run.config.schedule.test_crops
    taps = dict.fromkeys([backbone.taps[-1], *(source.backbone.taps[-1] for source in sources)])
    sentences = [
        "On the left the image as the networks see it, with its true class. For each network, over the image in grey: "
        f"the mean over channels of |F| at its last tap ({', '.join(taps)}), and Grad-CAM at the last feature map "
        "before the pooling, both enlarged from the coarse resolution of those maps."
    ]
    if salient:
        sentences.append(
            "Saliency is the gradient of the class's logit with respect to the image, the largest absolute value over "
            f"the colours of each pixel, blurred by a Gaussian of {backbone.image_size / 64:.2g} pixels."
        )
    sentences.append(
        "Dark is the lowest value of each map, bright its highest, so that brightness cannot be compared between "
        "maps. Below, the predicted class and its softmax probability."
    )
    maps = "Grad-CAM and saliency are" if salient else "Grad-CAM is"
    classes = f"{maps} for the true class, also where another one was predicted"
    named = " (named as ImageNet's, in torchvision's order)" if any(source.of_imagenet for source in sources) else ""
    if len(sources) == 1:
        classes += "; the source network has no head for these classes, and there for the class of its own that it "
        classes += f"predicts{named}"
    elif sources:
        classes += "; the source networks have no head for these classes, and there for the class of their own that "
        classes += f"they predict{named}"
    sentences.append(f"{classes}.")
    if backbone.weights == "none":
        sentences.append("The targets began at random weights: what they began as is not shown.")
    if crops > 1:
        sentences.append(f"Predictions are over {crops} crops, maps of the centre crop.")
    return " ".join(sentences)

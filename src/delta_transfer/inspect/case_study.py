"""Pictures of how fine-tuned networks and their sources see single test images.

Pictures of single images illustrate and prove nothing; their captions say how the images were picked. Grad-CAM comes
from the package grad-cam. Everything is computed from the runs' own networks (replay.py).

Runs whose target begins with random weights or has a source= of its own (Scratch, L2T-ww) get saliency maps, too, as in
the paper of L2T-ww. A network with random weights is not a source: it is not shown, and has no unused channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from scipy.special import softmax
from torch import Tensor

from ..common.console import log, printable
from ..common.errors import UserError
from ..models import Network
from ..models.zoo import BackboneConfig, weights_file
from ..records.arrays import Predictions, predictions
from ..records.cards import read_card
from ..records.reading import method_title, transfers
from . import learned_attention
from .image_maps import maps_of, overlaid, saliency
from .replay import Replay


@dataclass(frozen=True)
class Seen:
    """How one network sees the N shown images."""

    label: str
    classes: str  # the class of Grad-CAM and saliency, in words
    maps: dict[str, np.ndarray]  # activation, Grad-CAM and on request saliency: (N, H, W), each scaled to 0..1
    texts: list[str]  # the predicted class of each image, with its probability
    verdicts: list[bool | None]  # right or wrong; None: the network knows other classes


@dataclass(frozen=True)
class ShownSource:
    """A network that runs start from or learn from."""

    label: str
    network: Network
    backbone: BackboneConfig
    classes: list[str] | None  # their names, if known
    of_imagenet: bool = False  # whether the names are ImageNet's


def check_comparable(runs: list[Replay]) -> None:
    """Raises UserError unless all runs start from one source network, or at random, and read the same test images."""
    first = runs[0]
    if not first.config.backbone.taps:
        raise UserError(f"{first.run_id}: backbone.taps is empty, there is no feature map to show.")
    for run in runs:
        if run.dataset.pairs is not None:
            raise UserError(f"{run.run_id} verifies pairs: a case study needs test images that are classified.")

    def view(run: Replay) -> dict[str, object]:
        backbone, schedule = run.config.backbone, run.config.schedule
        return {
            **{key: run.record[key] for key in ("dataset_fingerprint", "weights_fingerprint")},
            **{f"backbone.{key}": value for key, value in vars(backbone).items() if key != "weights"},
            **{f"schedule.{key}": getattr(schedule, key) for key in ("aspect", "test_crops")},
        }

    for run in runs[1:]:
        if differing := [key for key, value in view(run).items() if value != view(first)[key]]:
            raise UserError(f"{first.run_id} and {run.run_id} cannot be compared: they differ in {differing[0]}.")


def labels_of(runs: list[Replay]) -> list[str]:
    """Method and seed, and the run's hash if several runs share both."""
    short = [f"{method_title(run.record)}, seed {run.config.seed}" for run in runs]
    return [
        f"{label} ({run.run_id.rsplit('-', 1)[-1]})" if short.count(label) > 1 else label
        for run, label in zip(runs, short, strict=True)
    ]


# --- Which images ---------------------------------------------------------------------------------------------------


def predictions_of(run: Replay) -> Predictions:
    made = predictions(run.record)
    if made is None:
        raise UserError(f"{run.run_id} has no predictions.npz: it was not tested, or the file was not kept.")
    true = run.dataset.labels[run.splits.test]
    if not np.array_equal(made.index, run.splits.test) or not np.array_equal(made.labels, true):
        raise UserError(f"{run.run_id}: its predictions.npz is not of this data set's test images.")
    return made


def disagreements(a: Predictions, b: Predictions) -> dict[str, np.ndarray]:
    """Positions in the test split of the images that one run predicts right and the other wrong.

    The largest margin comes first: the right run's softmax probability of the true class, minus the other run's. Ties
    keep the order of the data set.
    """
    true = np.arange(len(a.labels)), a.labels
    margin = softmax(b.logits.astype(np.float64), axis=1)[true] - softmax(a.logits.astype(np.float64), axis=1)[true]

    def sorted_by(values: np.ndarray, kind: np.ndarray) -> np.ndarray:
        order = np.argsort(-values, kind="stable")
        return order[kind[order]]

    return {
        "b_right_a_wrong": sorted_by(margin, b.correct & ~a.correct),
        "a_right_b_wrong": sorted_by(-margin, a.correct & ~b.correct),
    }


def places_of(wanted: Sequence[int], index: np.ndarray) -> np.ndarray:
    """Positions in the test split, `index`, of data set indices. Raises UserError for one that is not in it."""
    place = {int(image): i for i, image in enumerate(index)}
    absent = [image for image in wanted if image not in place]
    if absent:
        raise UserError(
            f"--images: {', '.join(map(str, absent))} not among the {len(place):,} test images, whose indices are "
            f"from {min(place)} to {max(place)} (predictions.npz, `index`)."
        )
    return np.array([place[image] for image in wanted])


# --- How networks see them ------------------------------------------------------------------------------------------


def all_maps(
    network: Network, backbone: BackboneConfig, images: Tensor, classes: np.ndarray | None, salient: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The maps of `Seen` and logits (N, K). classes: (N,), None for the predicted ones."""
    activation, cam, logits = maps_of(network, images, classes)
    maps = {"activation": activation, "Grad-CAM": cam}
    if salient:
        wanted = logits.argmax(axis=1) if classes is None else classes
        maps["saliency"] = saliency(network, images, wanted, backbone.std)
    return maps, logits


def target_seen(run: Replay, label: str, made: Predictions, shown: np.ndarray, images: Tensor, salient: bool) -> Seen:
    """The texts are from the predictions that the run recorded; Grad-CAM and saliency are for the true class."""
    maps, logits = all_maps(run.target, run.config.backbone, images, made.labels[shown], salient)
    recorded = made.logits[shown].argmax(axis=1)
    other = made.index[shown][logits.argmax(axis=1) != recorded]
    if len(other) and run.config.schedule.test_crops == 1:
        log.info(
            f"{run.run_id}: the network predicts other classes for the test images {other.tolist()} than the run "
            "recorded, on another device or with another version"
        )
    names = [tidy(name) for name in run.dataset.classes]
    return Seen(label, "true class", maps, with_percent(made.logits[shown], names), list(made.correct[shown]))


def sources_shown(runs: list[Replay]) -> list[ShownSource]:
    """The networks that the runs start from, except random ones, and that their `source` names; each once."""
    first = runs[0].config.backbone
    found: dict[str, ShownSource] = {}  # by fingerprint
    if first.weights != "none":
        known = imagenet_names(first.name, runs[0].source)
        source = ShownSource("source network", runs[0].source, first, known, of_imagenet=known is not None)
        found[runs[0].record["weights_fingerprint"]] = source
    for loaded in (loaded for run in runs for loaded in run.sources if loaded.fingerprint not in found):
        label = f"source {loaded.name}"
        if any(label == other.label for other in found.values()):
            label += f" {loaded.fingerprint[:8]}"
        own = names_on_card(loaded.backbone)
        known = own or imagenet_names(loaded.backbone.name, loaded.network)
        source = ShownSource(label, loaded.network, loaded.backbone, known, own is None and known is not None)
        found[loaded.fingerprint] = source
    return list(found.values())


def source_seen(source: ShownSource, images: Tensor, normalised: BackboneConfig, salient: bool) -> Seen:
    """How a source sees the images. It has no head for the target's classes: its maps are for its own predicted class.

    images: normalised for the network of `normalised`, which may differ from the source's normalisation.
    """
    images = renormalised(images, normalised, source.backbone)
    maps, logits = all_maps(source.network, source.backbone, images, None, salient)
    names = source.classes or [f"source class {k}" for k in range(logits.shape[1])]
    return Seen(source.label, "its own class", maps, with_percent(logits, names), [None] * len(logits))


def renormalised(images: Tensor, of: BackboneConfig, to: BackboneConfig) -> Tensor:
    """Images (N, 3, H, W) with the mean and standard deviation of another network."""
    if (of.mean, of.std) == (to.mean, to.std):
        return images
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=images.device).view(3, 1, 1) for values in (of.mean, of.std, to.mean, to.std)
    )
    return (images * std + mean - own_mean) / own_std


def imagenet_names(name: str, network: Network) -> list[str] | None:
    """ImageNet's classes in torchvision's order, for a network of torchvision with a head for 1000 classes."""
    if network.classes == 1000 and name in torchvision.models.list_models(module=torchvision.models):
        names: list[str] = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
        return names
    return None


def names_on_card(backbone: BackboneConfig) -> list[str] | None:
    """The classes of a network that delta-pretrain trained, from the model card in its file."""
    path = weights_file(backbone.weights)
    try:
        return None if path is None else [tidy(name) for name in read_card(path)["classes"]]
    except UserError:
        return None


def tidy(name: str) -> str:
    """A class name in plain writing: "012.Yellow_headed_Blackbird" -> "Yellow headed Blackbird"."""
    number, dot, rest = name.partition(".")
    return printable((rest if dot and number.isdigit() else name).replace("_", " ")).replace("\n", " ")


def with_percent(logits: np.ndarray, names: Sequence[str]) -> list[str]:
    """The class that each row of logits (N, K) predicts, with its softmax probability."""
    likeliest = [(row.argmax(), row.max()) for row in softmax(logits.astype(np.float64), axis=1)]
    return [f"{names[k]}, {'< 1' if p < 0.01 else format(100 * p, '.0f')} %" for k, p in likeliest]


Picture = tuple[str, Figure, str]  # the stem of its file's name, the figure, the caption


def pictures(runs: list[Replay], labels: list[str], chosen: list[int] | None, count: int) -> Iterator[Picture]:
    """One picture of the test images `chosen` by their data set index, or one for each kind of disagreement.

    Args:
        labels: of the runs. Images are picked on which the first two runs, A and B, disagree.
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

    pixels: (N, H, W, 3) in 0..1. left: the text below each image.
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
    classes = f"{maps} for the true class, even if another one was predicted"
    named = " (named as ImageNet's, in torchvision's order)" if any(source.of_imagenet for source in sources) else ""
    if sources:
        subject = "the source network has" if len(sources) == 1 else "the source networks have"
        predicts = "it predicts" if len(sources) == 1 else "they predict"
        own = f"the class of {'its' if len(sources) == 1 else 'their'} own that {predicts}{named}"
        classes += f"; {subject} no head for these classes, and there for {own}"
    sentences.append(f"{classes}.")
    if backbone.weights == "none":
        sentences.append("The targets began with random weights, which are not shown.")
    if crops > 1:
        sentences.append(f"Predictions are over {crops} crops, maps of the centre crop.")
    return " ".join(sentences)

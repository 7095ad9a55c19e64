"""How fine-tuned networks and their sources see single test images: which images, which maps, which classes.

Runs whose target begins at random weights or has a source= of its own (Scratch, L2T-ww) get saliency maps too, as in
the paper of L2T-ww. A network of random weights is no source: it is not shown, and has no unused channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from scipy.special import softmax
from torch import Tensor

from ..common.console import log, printable
from ..common.errors import UserError
from ..models import Network
from ..models.zoo import BackboneConfig, weights_file
from ..records.arrays import Predictions, predictions
from ..records.cards import read_card
from ..records.reading import method_title
from .image_maps import maps_of, saliency
from .replay import Replay


@dataclass(frozen=True)
class Seen:
    """How one network sees the N shown images."""

    label: str
    classes: str  # which class Grad-CAM and saliency are for
    maps: dict[str, np.ndarray]  # activation, Grad-CAM and, where asked for, saliency: (N, H, W) in 0..1, its own range
    texts: list[str]  # the predicted class of each image, with its probability
    verdicts: list[bool | None]  # right or wrong; None: the network knows other classes


@dataclass(frozen=True)
class ShownSource:
    """A network that runs start from or learn from."""

    label: str
    network: Network
    backbone: BackboneConfig
    classes: list[str] | None  # their names, where they are known
    of_imagenet: bool = False  # whether the names are ImageNet's


def check_comparable(runs: list[Replay]) -> None:
    """Raises UserError unless all start from one source network, or at random, and see the same test images alike."""
    first = runs[0]
    if not first.config.backbone.taps:
        raise UserError(f"{first.run_id}: backbone.taps is empty, there is no feature map to show.")
    for run in runs:
        if run.dataset.pairs is not None:
            raise UserError(f"{run.run_id} verifies pairs: a case study is of test images that are classified.")
    views = []
    for run in runs:
        backbone, schedule = run.config.backbone, run.config.schedule
        views.append(
            {
                "dataset_fingerprint": run.record["dataset_fingerprint"],
                "weights_fingerprint": run.record["weights_fingerprint"],
                **{f"backbone.{key}": value for key, value in vars(backbone).items() if key != "weights"},
                **{f"schedule.{key}": getattr(schedule, key) for key in ("aspect", "test_crops")},
            }
        )
    for run, view in zip(runs, views, strict=True):
        differing = [key for key in view if view[key] != views[0][key]]
        if differing:
            raise UserError(f"{first.run_id} and {run.run_id} cannot be compared: they differ in {differing[0]}.")


def labels_of(runs: list[Replay]) -> list[str]:
    """Method and seed, and the run's hash where several runs share both."""
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
    """Positions in the test split of the images that one predicts right and the other wrong.

    The largest margin comes first: softmax probability of the true class under the one that is right, minus that under
    the other. Ties keep the order of the data set.
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
        maps["saliency"] = saliency(
            network, images, logits.argmax(axis=1) if classes is None else classes, backbone.std
        )
    return maps, logits


def target_seen(run: Replay, label: str, made: Predictions, shown: np.ndarray, images: Tensor, salient: bool) -> Seen:
    """The texts are from the predictions that the run recorded; Grad-CAM and saliency are for the true class."""
    maps, logits = all_maps(run.target, run.config.backbone, images, made.labels[shown], salient)
    recorded = made.logits[shown].argmax(axis=1)
    other = made.index[shown][logits.argmax(axis=1) != recorded]
    if len(other) and run.config.schedule.test_crops == 1:
        log.info(
            f"{run.run_id}: its maps are of a network that takes the test images {other.tolist()} for another class "
            "than the run recorded: another device or version computed those"
        )
    names = [tidy(name) for name in run.dataset.classes]
    return Seen(label, "true class", maps, with_percent(made.logits[shown], names), list(made.correct[shown]))


def sources_shown(runs: list[Replay]) -> list[ShownSource]:
    """The networks that the runs start from, unless at random, and that their `source` names; each network once."""
    first = runs[0].config.backbone
    found: dict[str, ShownSource] = {}  # by fingerprint
    if first.weights != "none":
        known = imagenet_names(first.name, runs[0].source)
        found[runs[0].record["weights_fingerprint"]] = ShownSource(
            "source network", runs[0].source, first, known, of_imagenet=known is not None
        )
    for run in runs:
        for loaded in run.sources:
            label = f"source {loaded.name}"
            if any(label == other.label for other in found.values()) and loaded.fingerprint not in found:
                label += f" {loaded.fingerprint[:8]}"
            own = names_on_card(loaded.backbone)
            known = own or imagenet_names(loaded.backbone.name, loaded.network)
            of_imagenet = own is None and known is not None
            source = ShownSource(label, loaded.network, loaded.backbone, known, of_imagenet)
            found.setdefault(loaded.fingerprint, source)
    return list(found.values())


def source_seen(source: ShownSource, images: Tensor, normalised: BackboneConfig, salient: bool) -> Seen:
    """A source has no head for the target's classes. Its maps are for the class of its own that it predicts.

    `images` are normalised for the network of `normalised`, which may differ from the source's normalisation.
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
    """ImageNet's classes in torchvision's order, for a network of torchvision's that has a head for 1000 classes."""
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
    """A class name as people write it: "012.Yellow_headed_Blackbird" -> "Yellow headed Blackbird"."""
    number, dot, rest = name.partition(".")
    return printable((rest if dot and number.isdigit() else name).replace("_", " ")).replace("\n", " ")


def with_percent(logits: np.ndarray, names: Sequence[str]) -> list[str]:
    """The class that each row of logits (N, K) predicts, with its softmax probability."""
    likeliest = [(row.argmax(), row.max()) for row in softmax(logits.astype(np.float64), axis=1)]
    return [f"{names[k]}, {'< 1' if p < 0.01 else format(100 * p, '.0f')} %" for k, p in likeliest]

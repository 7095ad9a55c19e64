"""delta-report case-study: what fine-tuned networks look at, image by image, and what becomes of unused channels.

    delta-report case-study RUN_A RUN_B                    # pictures of images on which A and B disagree
    delta-report case-study RUN_A RUN_B --images 17,230    # or of these, by their index in the data set

Runs whose target begins at random weights or has a source= of its own (Scratch, L2T-ww) get saliency maps too, as in
the paper of L2T-ww. A network of random weights is no source: it is not shown, and has no unused channels.

Pictures of single images illustrate; they are no evidence, and their captions say how they were picked.
Grad-CAM is that of the package grad-cam. Everything is computed from the runs' own networks (replay.py).
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torchvision
from scipy.special import softmax
from torch import Tensor

from ..common.errors import UserError
from ..common.tables import as_markdown, on_screen
from ..common.untrusted import printable
from ..config import BackboneConfig
from ..experiment.sources import sources_of
from ..models import Network
from ..records.reading import Predictions, predictions
from ..reporting.comparison import display, transfers
from .finished import run_folder
from .image_maps import grad_cam_package, maps_of, saliency
from .learned_attention import attended, has_modules
from .learned_attention import caption as caption_of_attention
from .learned_attention import figure_of as figure_of_attention
from .replay import Replay, replay
from .unused_channels import Change, caption, figure_of, mean_activations, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Warn = Callable[[str], None]
SHUFFLE_SEED = 0  # of the test images over which activations are averaged


@dataclass(frozen=True)
class Seen:
    """How one network sees the N shown images."""

    label: str
    classes: str  # which class Grad-CAM is for
    activation: np.ndarray  # (N, H, W): mean over channels of |F| at the last tap, 0..1 of each image's own range
    cam: np.ndarray  # (N, H, W): Grad-CAM, likewise
    saliency: np.ndarray | None  # (N, H, W): likewise; None where it is not asked for
    texts: list[str]  # what it takes each image for, and how surely
    verdicts: list[bool | None]  # right or wrong; None: it knows other classes

    @property
    def maps(self) -> dict[str, np.ndarray]:
        found = {"activation": self.activation, "Grad-CAM": self.cam, "saliency": self.saliency}
        return {name: values for name, values in found.items() if values is not None}


@dataclass(frozen=True)
class Source:
    """A network that runs start or learn from."""

    label: str
    network: Network
    backbone: BackboneConfig
    classes: list[str] | None  # their names, where they are known
    of_imagenet: bool = False  # those names


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    try:
        report(args, lambda line: print(printable(line), file=sys.stderr))
    except (UserError, OSError) as error:
        print(f"delta-report case-study: {printable(str(error))}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="delta-report case-study",
        description="Pictures of test images on which two runs disagree, with activation maps and Grad-CAM of each run "
        "and of the source network; and which of the source's unused channels fine-tuning brings to life. Runs with a "
        "source= or from random weights get saliency maps, too.",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its id below results/runs; first A, B")
    p.add_argument("--images", type=indices, metavar="INDEX,...", help="show these test images, by data set index")
    p.add_argument("--count", type=positive, default=3, metavar="N", help="images of each kind (default: 3)")
    p.add_argument(
        "--silent",
        type=fraction,
        default=0.1,
        metavar="F",
        help="a channel below this fraction of its tap's median channel is silent (default: 0.1)",
    )
    p.add_argument(
        "--count-images",
        type=positive,
        default=512,
        metavar="N",
        help="test images over which channels are averaged (default: 512)",
    )
    p.add_argument("--output", type=Path, default=Path("results/case-study"), metavar="DIR")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="the data set's folder, where records name another")
    p.add_argument("--weights", type=Path, metavar="FILE", help="the source weights, where records name another file")
    return p


def indices(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def fraction(text: str) -> float:
    if not 0 < float(text) < 1:
        raise ValueError(text)
    return float(text)


def report(args: argparse.Namespace, warn: Warn) -> None:
    """Everything that the command makes. Raises UserError."""
    pictures_wanted = args.images is not None or len(args.runs) > 1
    if pictures_wanted:
        grad_cam_package()  # if it is missing, that is said before anything is computed
    else:
        warn("one run, and no --images: no pictures of disagreements")
    runs = [replay(run_folder(name), data_dir=args.data_dir, weights=args.weights) for name in args.runs]
    check_comparable(runs)
    labels = labels_of(runs)
    for run in runs:
        _ = run.target  # if one is missing, that too
    args.output.mkdir(parents=True, exist_ok=True)
    if pictures_wanted:
        pictures(runs, labels, args, warn)
    for run, label in zip(runs, labels, strict=True):
        attention_pictures(run, label, args)
    if runs[0].config.backbone.weights == "none":
        warn("no table of unused channels: these networks began at random weights, not at a source network")
    else:
        channels(runs, labels, args, warn)


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
    """Method and seed; the run's hash too where that does not tell two apart."""
    short = [f"{display(run.config.reg.name)}, seed {run.config.seed}" for run in runs]
    return [
        f"{label} ({run.run_id.rsplit('-', 1)[-1]})" if short.count(label) > 1 else label
        for run, label in zip(runs, short, strict=True)
    ]


# ---- which images ----------------------------------------------------------------------------------------


def pictures(runs: list[Replay], labels: list[str], args: argparse.Namespace, warn: Warn) -> None:
    """A figure and its caption for each kind of image, written to args.output."""
    found = [predictions_of(run) for run in runs]
    sources, salient = sources_shown(runs), any(transfers(run.record) for run in runs)
    if args.images is not None:
        kinds = {"chosen": places_of(args.images, found[0])}
    else:
        kinds = disagreements(found[0], found[1])
    for stem, places in kinds.items():
        if len(places) == 0:
            warn(f"{stem}: there is no such image, so no picture")
            continue
        shown = places if args.images is not None else places[: args.count]
        index, labels_shown = found[0].index[shown], found[0].labels[shown]
        images = torch.cat(list(runs[0].images(index)))
        networks = [source_seen(source, images, runs[0].config.backbone, salient) for source in sources]
        for run, label, made in zip(runs, labels, found, strict=True):
            networks.append(target_seen(run, label, made, shown, images, salient, warn))
        names = [tidy(runs[0].dataset.classes[label]) for label in labels_shown]
        left = [f"{name}\n(image {i})" for name, i in zip(names, index, strict=True)]
        figure = draw(pixels_of(runs[0], images), left, networks)
        if args.images is not None:
            picked = "Test images, chosen by hand."
        else:
            picked = how_picked(stem, kinds, labels, len(found[0].labels), len(shown))
        write(figure, args.output / stem, f"{picked} {how_made(runs[0], sources, salient)}")


def predictions_of(run: Replay) -> Predictions:
    made = predictions(run.record)
    if made is None:
        raise UserError(f"{run.run_id} has no predictions.npz: the test part was not looked at, or it was not kept.")
    true = run.dataset.labels[run.parts.test]
    if not np.array_equal(made.index, run.parts.test) or not np.array_equal(made.labels, true):
        raise UserError(f"{run.run_id}: its predictions.npz is not of this data set's test images.")
    return made


def disagreements(a: Predictions, b: Predictions) -> dict[str, np.ndarray]:
    """Places in the test part where one is right and the other wrong.

    The largest margin first: softmax probability of the true class under the one that is right, minus that under the
    other. Ties in the order of the data set.
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


def places_of(wanted: list[int], made: Predictions) -> np.ndarray:
    """Where data set indices are in the test part. Raises UserError for one that is not."""
    place = {int(index): i for i, index in enumerate(made.index)}
    absent = [index for index in wanted if index not in place]
    if absent:
        raise UserError(
            f"--images: {', '.join(map(str, absent))} not among the {len(place):,} test images, whose indices are "
            f"from {min(place)} to {max(place)} (predictions.npz, `index`)."
        )
    return np.array([place[index] for index in wanted])


# ---- what networks make of them --------------------------------------------------------------------------


def target_seen(
    run: Replay, label: str, made: Predictions, shown: np.ndarray, images: Tensor, salient: bool, warn: Warn
) -> Seen:
    """With the predictions that the run recorded; Grad-CAM and saliency are for the true class."""
    true = made.labels[shown]
    activation, cam, logits = maps_of(run.target, images, true)
    slopes = saliency(run.target, images, true, run.config.backbone.std) if salient else None
    recorded, probabilities = made.logits[shown].argmax(axis=1), softmax(made.logits[shown].astype(np.float64), axis=1)
    other = made.index[shown][logits.argmax(axis=1) != recorded]
    if len(other) and run.config.schedule.test_crops == 1:
        warn(
            f"{run.run_id}: its maps, made in fp32, are of a network that takes the test images {other.tolist()} for "
            f"another class than the run recorded with precision={run.config.precision}"
        )
    names = [tidy(run.dataset.classes[k]) for k in recorded]
    texts = [worded(name, row[k]) for name, k, row in zip(names, recorded, probabilities, strict=True)]
    return Seen(label, "true class", activation, cam, slopes, texts, list(made.correct[shown]))


def sources_shown(runs: list[Replay]) -> list[Source]:
    """What the runs start from, unless it is random, and what their `source` names; each network once."""
    first = runs[0].config.backbone
    found: dict[str, Source] = {}  # by fingerprint
    if first.weights != "none":
        known = imagenet_names(first.name, runs[0].source)
        found[runs[0].record["weights_fingerprint"]] = Source(
            "source network", runs[0].source, first, known, of_imagenet=known is not None
        )
    for run in runs:
        for loaded, named in zip(run.sources, sources_of(run.config.source), strict=True):
            known = imagenet_names(loaded.backbone.name, loaded.network)
            classes = [tidy(name) for name in named.card.content["classes"]] if named.card else known
            label = f"source {loaded.name}"
            if any(label == other.label for other in found.values()) and loaded.fingerprint not in found:
                label += f" {loaded.fingerprint[:8]}"
            of_imagenet = named.card is None and known is not None
            source = Source(label, loaded.network, loaded.backbone, classes, of_imagenet)
            found.setdefault(loaded.fingerprint, source)
    return list(found.values())


def source_seen(source: Source, images: Tensor, normalised: BackboneConfig, salient: bool) -> Seen:
    """It has no head for the target's classes: its maps are for the class of its own that it takes each image for.

    `images` are those of a network `normalised` in another way, perhaps.
    """
    images = renormalised(images, normalised, source.backbone)
    activation, cam, logits = maps_of(source.network, images, None)
    names = source.classes or [f"source class {k}" for k in range(logits.shape[1])]
    predicted, probabilities = logits.argmax(axis=1), softmax(logits.astype(np.float64), axis=1)
    texts = [worded(names[k], row[k]) for k, row in zip(predicted, probabilities, strict=True)]
    slopes = saliency(source.network, images, predicted, source.backbone.std) if salient else None
    return Seen(source.label, "its own class", activation, cam, slopes, texts, [None] * len(texts))


def renormalised(images: Tensor, of: BackboneConfig, to: BackboneConfig) -> Tensor:
    """Images (N, 3, H, W) with the mean and standard deviation of another network."""
    if (of.mean, of.std) == (to.mean, to.std):
        return images
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=images.device).view(3, 1, 1) for values in (of.mean, of.std, to.mean, to.std)
    )
    return (images * std + mean - own_mean) / own_std


def imagenet_names(name: str, network: Network) -> list[str] | None:
    """In torchvision's order, if this is a network of torchvision's with a head for 1000 classes."""
    head = network.traced.get_submodule(network.head)
    if head.out_features == 1000 and name in torchvision.models.list_models(module=torchvision.models):
        return torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
    return None


def pixels_of(run: Replay, images: Tensor) -> np.ndarray:
    """(N, H, W, 3) in 0..1: what the network sees, with the normalisation undone."""
    mean, std = (np.array(values, dtype=np.float32) for values in (run.config.backbone.mean, run.config.backbone.std))
    return (images.permute(0, 2, 3, 1).cpu().numpy() * std + mean).clip(0, 1)


def attention_pictures(run: Replay, label: str, args: argparse.Namespace) -> None:
    """attention-RUN-stageN, where the run has attention modules of its own: a figure and its caption for each stage."""
    if not has_modules(run):
        return
    test = run.parts.test
    if args.images is None:
        shown, picked = test[: args.count], "The first test images of the data set."
    else:
        shown, picked = test[[list(test).index(i) for i in args.images]], "Test images, chosen by hand."
    images = torch.cat(list(run.images(shown)))
    left = [f"{tidy(run.dataset.classes[run.dataset.labels[i]])}\n(image {i})" for i in shown]
    for stage in attended(run, images):
        figure = figure_of_attention(pixels_of(run, images), left, stage)
        write(
            figure,
            args.output / f"attention-{run.run_id}-stage{stage.stage}",
            f"{label}. {caption_of_attention(stage, picked)}",
        )


# ---- figures and words -----------------------------------------------------------------------------------


def draw(pixels: np.ndarray, left: list[str], networks: list[Seen]) -> "Figure":
    """A row for each image: the image, then the maps of each network.

    `pixels` (N, H, W, 3) in 0..1, `left` what stands below each of them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    side, inner, outer, text, head = 1.3, 0.06, 0.3, 0.5, 0.5  # inches
    rows, shown = len(pixels), len(networks[0].maps)
    wide = shown * side + (shown - 1) * inner
    width = outer + side + len(networks) * (outer + wide) + outer
    height = head + rows * (side + text) + 0.3
    figure = Figure(figsize=(width, height))
    colours = matplotlib.colormaps["inferno"]

    def show(images: list[np.ndarray], x: float, row: int, below: str, above: str) -> None:
        bottom = height - head - row * (side + text) - side
        for number, image in enumerate(images):
            at = (x + number * (side + inner), bottom, side, side)
            panel = figure.add_axes([at[0] / width, at[1] / height, at[2] / width, at[3] / height])
            panel.imshow(image, interpolation="nearest")
            panel.set_axis_off()
        middle = (x + (len(images) * (side + inner) - inner) / 2) / width
        figure.text(middle, (bottom - 0.05) / height, below, ha="center", va="top", fontsize=7.5, parse_math=False)
        if row == 0:
            figure.text(middle, (bottom + side + 0.06) / height, above, ha="center", va="bottom", fontsize=8.5)

    for row in range(rows):
        show([pixels[row]], outer, row, left[row], "test image\nand its class")
        grey = pixels[row] @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        for number, seen in enumerate(networks):
            heat = [0.4 * grey[..., None] + 0.6 * colours(m[row])[..., :3] for m in seen.maps.values()]
            x = 2 * outer + side + number * (outer + wide)
            verdict = {True: "✓ right:\n", False: "✗ wrong:\n", None: "of its own classes:\n"}[seen.verdicts[row]]
            show(heat, x, row, verdict + seen.texts[row], f"{seen.label}\n{'  |  '.join(seen.maps)}, {seen.classes}")
    scale = "Maps lie over the image in grey. Dark: the lowest value of each map, bright: its highest."
    figure.text(0.5, 0.1 / height, scale, ha="center", va="bottom", fontsize=7.5, color="#555555")
    return figure


def tidy(name: str) -> str:
    """A class name as people write it: "012.Yellow_headed_Blackbird" -> "Yellow headed Blackbird"."""
    number, dot, rest = name.partition(".")
    return printable((rest if dot and number.isdigit() else name).replace("_", " ")).replace("\n", " ")


def worded(name: str, probability: float) -> str:
    return f"{name}, {'< 1' if probability < 0.01 else format(100 * probability, '.0f')} %"


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


def how_made(run: Replay, sources: list[Source], salient: bool) -> str:
    crops = run.config.schedule.test_crops
    taps = dict.fromkeys([run.config.backbone.taps[-1], *(source.backbone.taps[-1] for source in sources)])
    named = " (named as ImageNet's, in torchvision's order)" if any(source.of_imagenet for source in sources) else ""
    many, maps = len(sources) > 1, "Grad-CAM and saliency are" if salient else "Grad-CAM is"
    return (
        "On the left the image as the networks see it, with its true class. For each network, over the image in grey: "
        f"the mean over channels of |F| at its last tap ({', '.join(taps)}), and Grad-CAM at the last feature map "
        "before the pooling, both enlarged from the coarse resolution of those maps. "
        + (
            "Saliency is the gradient of the class's logit with respect to the image, the largest absolute value over "
            f"the colours of each pixel, blurred by a Gaussian of {run.config.backbone.image_size / 64:.2g} pixels. "
            if salient
            else ""
        )
        + "Dark is the lowest value of each map, bright its highest, so that brightness cannot be compared between "
        "maps. Below, the predicted class and its softmax probability. "
        f"{maps} for the true class, also where another one was predicted"
        + (
            f"; the source network{'s have' if many else ' has'} no head for these classes, and there for the class of "
            f"{'their' if many else 'its'} own that {'they predict' if many else 'it predicts'}{named}."
            if sources
            else "."
        )
        + (
            " The targets began at random weights: what they began as is not shown."
            if run.config.backbone.weights == "none"
            else ""
        )
        + (f" Predictions are over {crops} crops, maps of the centre crop." if crops > 1 else "")
    )


def write(figure: "Figure", path: Path, text: str) -> None:
    """<path>.png, .pdf and the caption .txt."""
    # Without its date, which matplotlib would add to a PDF, the same input makes the same bytes.
    figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, bbox_inches="tight")
    figure.savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")
    path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    print(f"{path}.png, .pdf, .txt")


# ---- channels --------------------------------------------------------------------------------------------


def channels(runs: list[Replay], labels: list[str], args: argparse.Namespace, warn: Warn) -> None:
    """unused_channels: the table, on the screen and as Markdown, and a figure."""
    test = np.random.default_rng(SHUFFLE_SEED).permutation(runs[0].parts.test)[: args.count_images]
    source = mean_activations(runs[0].source, runs[0].images(test))
    changes = [
        Change(label, run.config.reg.name, source, mean_activations(run.target, run.images(test)))
        for run, label in zip(runs, labels, strict=True)
    ]
    table = table_of(changes, args.silent, len(test), warn)
    write(figure_of(changes, args.silent), args.output / "unused_channels", caption(changes, args.silent, len(test)))
    (args.output / "unused_channels.md").write_text(as_markdown([table]), encoding="utf-8")
    print(f"{args.output / 'unused_channels.md'}\n")
    sys.stdout.write(on_screen([table], sys.stdout.isatty()))

"""Model cards: delta-pretrain and delta-export describe a network in its file's metadata and in MODEL_CARD.md.

`source=PATH` reads the metadata; MODEL_CARD.md is for people. Nothing here imports torch.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..common.console import shorten_list, spelled_out
from ..common.errors import UserError
from ..common.tables import markdown_text
from .files import open_safetensors
from .metrics import METRICS

SUFFIX = ".safetensors"
FORMAT = 1
KEY, DIGEST = "model_card", "model_card_sha256"
AS_SOURCE = f"A source network for delta-run: `source=path/to/model{SUFFIX}`, where this file lies."


def make_card(summary: dict[str, Any], classes: tuple[str, ...] | None, weights_fingerprint: str) -> dict[str, Any]:
    """The card of a network. summary: of the run that trained it. weights_fingerprint: of the trained weights.

    classes: None if their names were not recorded.
    """
    config = summary["config"]
    backbone, schedule = config["backbone"], config["schedule"]
    # Runs in bf16 that lack this entry were measured in bf16.
    in_fp32 = config["precision"] == "fp32" or "evaluation" in summary["identity"]
    measured = {key: summary[key] for key, one in METRICS.items() if one.short and summary.get(key) is not None}
    graphs = config.get("task", "classification").startswith("graph_")
    of_graphs = {"task": config.get("task"), "label_scale": summary.get("label_scale")}
    of_images = {
        "orientation": "as EXIF says",
        "transparency": "on white",
        "scale": config["dataset"].get("scale"),  # of pixels with more than 8 bits
        "resize": backbone["resize"],
        "aspect": schedule["aspect"],
        "interpolation": f"{backbone.get('interpolation', 'bilinear')}, antialiased",
        "center_crop": backbone["image_size"],
        **({"test_image": "whole"} if schedule.get("test_image") == "whole" else {}),
        **{key: backbone[key] for key in ("mean", "std")},
    }
    return {
        "format": FORMAT,
        "network": {key: value for key, value in backbone.items() if key != "weights"},
        "weights_fingerprint": weights_fingerprint,
        "started_from": Path(backbone["weights"]).name,  # "none": random weights
        "method": config["reg"]["name"],
        **(of_graphs if graphs else {"preprocessing": of_images}),
        "precision": {"training": config["precision"], "evaluation": "fp32" if in_fp32 else config["precision"]},
        "num_classes": summary["num_classes"],
        "classes": None if classes is None else list(classes),
        "data": {
            "name": config["dataset"]["name"],
            "fingerprint": summary["dataset_fingerprint"],
            **{key: summary[key] for key in ("n_train", "n_val", "n_test")},
        },
        "measured": measured | {"crops": schedule["test_crops"], "mirrored": config["dataset"].get("mirror", True)},
        **{key: summary[key] for key in ("run_id", "iterations", "seed", "command", "versions", "git_commit")},
    }


def metadata_of(card: dict[str, Any]) -> dict[str, str]:
    """The metadata of the safetensors file: the card as JSON, and its checksum."""
    text = json.dumps(card)
    return {KEY: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def in_words(card: dict[str, Any], use: str = AS_SOURCE) -> str:
    """The text of MODEL_CARD.md. use: its last paragraph."""
    network, data, measured = card["network"], card["data"], card["measured"]
    graphs = "preprocessing" not in card
    inputs = "graphs" if graphs else "images"
    counts = f"{data['n_train']:,} training, {data['n_val']:,} validation and {data['n_test']:,} test {inputs}"
    crops = ", mean of ten crops" if measured["crops"] == 10 else ""
    parts = {"test": ("test", data["n_test"]), "val": ("validation", data["n_val"])}
    accuracy = [
        (
            f"{measured[key]:.2f} % of n = {n:,} {part} {inputs} (top-1, last iteration, one run{crops})"
            if key.endswith("_top1")
            else f"{one.title} {one.shown(measured[key])} on n = {n:,} {inputs} (one run)"
        )
        for key, one in METRICS.items()
        if key in measured
        for part, n in [parts[key.partition("_")[0]]]
    ]
    size = f"{network['image_size']}-pixel images"
    start = "random weights" if card["started_from"] == "none" else f"the weights {card['started_from']}"
    names = shorten_list(card["classes"]) if card["classes"] else "their names were not recorded"
    rows = {
        "Network": f"{network['name']} for {'graphs' if graphs else size}, from {start}",
        "Taps": ", ".join(network["taps"]),
        "Classes": f"{card['num_classes']:,}: {names}",
        "Data set": f"{data['name']}: {counts}",
        "Data fingerprint": data["fingerprint"],
        "Accuracy": "; ".join(accuracy) or "not measured",
        "Precision": f"trained in {card['precision']['training']}, measured in {card['precision']['evaluation']}",
        "Weights fingerprint": card["weights_fingerprint"],
        "Trained by": f"run {card['run_id']}, reg={card['method']}, {card['iterations']:,} iterations, "
        f"seed {card['seed']}",
        "Command": card["command"],
        "Versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
        "Commit": card["git_commit"] or "not known",
    }
    lines = [f"# {network['name']}, trained on {data['name']}", ""]
    lines += [f"- {name}: {markdown_text(spelled_out(str(value)))}" for name, value in rows.items()]
    lines += ["", f"## From {'a graph to answers' if graphs else 'an image file to probabilities'}", ""]
    done = steps_of_graphs(card) if graphs else steps(card)
    lines += [f"{number}. {step}" for number, step in enumerate(done, 1)]
    lines += ["", use, ""]
    return "\n".join(lines)


def steps(card: dict[str, Any]) -> list[str]:
    """All steps from an image to probabilities, in order. A program that follows them agrees with delta-predict."""
    pixels, measured = card["preprocessing"], card["measured"]
    size, side = pixels["resize"], pixels["center_crop"]
    scale = (
        f" Pixels of more than 8 bits are scaled as dataset.scale={pixels['scale']} says." if pixels["scale"] else ""
    )
    if pixels["aspect"] == "squash":
        resized = f"The picture is squashed to {size} x {size} pixels"
    else:
        resized = f"The shorter side is resized to {size} pixels, the longer one in proportion, rounded down to pixels"
    views = f"the centre crop of {side} x {side} pixels is taken"
    filter_name = pixels["interpolation"].partition(",")[0].upper()
    mean = ""
    if pixels.get("test_image") == "whole":
        resized = f"{resized}, and the whole of it to {side} x {side}"
    if measured["crops"] == 10:
        views = f"crops of {side} x {side} pixels are taken at the four corners and in the centre"
        views += ", and at the same places of the picture mirrored left to right" if measured["mirrored"] else ""
        mean = " The logits of all crops are averaged first."
    return [
        "The picture is turned as its EXIF orientation says (Pillow: `ImageOps.exif_transpose`).",
        "Transparent pixels are put on white (`Image.alpha_composite`).",
        f"It is converted to RGB with 8 bits per channel.{scale}",
        f"{resized} ({pixels['interpolation']}; `Image.resize` with `Resampling.{filter_name}`), in 8 bits again.",
        f"From it {views}. The margin on the left and at the top is half of what is left over, rounded; a half is "
        "rounded to the even number.",
        f"The values are divided by 255 (RGB in 0..1), minus {pixels['mean']}, divided by {pixels['std']}, channel by "
        "channel: float32, (3, height, width).",
        f"The network computes in fp32, in evaluation mode. Probabilities are the softmax of its logits.{mean}",
    ]


def steps_of_graphs(card: dict[str, Any]) -> list[str]:
    """All steps from a graph to answers, in order."""
    answers = {
        "graph_properties": "The probability of a property is the sigmoid of its logit.",
        "graph_regression": f"A value is mean + std * logit: {card['label_scale']}.",
    }
    return [
        "A molecule is read from its SMILES by RDKit (`Chem.MolFromSmiles`); other graphs have edges of type 0 alone.",
        "A node is (atomic number - 1, chirality: unspecified 0, CW 1, CCW 2), or (label, 0) without chemistry.",
        "A bond is an edge in either direction, with (single 0, double 1, triple 2, aromatic 3; direction: none 0, "
        "end-up-right 1, end-down-right 2). The network adds an edge of each node to itself.",
        "The network computes in fp32, in evaluation mode. "
        + answers.get(card["task"], "Probabilities are the softmax of its logits."),
    ]


def read_card(path: Path) -> dict[str, Any]:
    """The model card in a file that delta-pretrain wrote. Raises UserError if there is none that can be used.

    `network` in the card has the options of a backbone without its weights, which are in the file.
    """
    if not path.is_file():
        raise UserError(f"source: there is no file {path}.")
    try:
        with open_safetensors(path, "np") as file:
            metadata = file.metadata() or {}
    except (OSError, ValueError) as error:
        raise UserError(f"source: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if KEY not in metadata:
        raise UserError(
            f"source: {path} has no model card, as delta-pretrain writes it. Name the network of such a file: "
            f"source=NAME:{path}, with a NAME of conf/backbone."
        )
    text = metadata[KEY]
    try:
        if hashlib.sha256(text.encode()).hexdigest() != metadata.get(DIGEST):
            raise ValueError("its checksum is wrong")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and this version reads {FORMAT}")
        if not isinstance(content["network"], dict) or not isinstance(content["weights_fingerprint"], str):
            raise ValueError("it is not complete")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"source: the model card of {path} cannot be used: {reason}") from None
    return dict(content)

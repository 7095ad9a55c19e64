"""Model cards: what delta-pretrain says of a network, in the metadata of its model.safetensors and in MODEL_CARD.md.

The one is read again (`source=PATH`), the other is for people. Nothing here imports torch.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open

from .config import BackboneConfig
from .console import few
from .errors import UserError
from .untrusted import spelled_out

SUFFIX = ".safetensors"
FORMAT = 1
KEY, DIGEST = "model_card", "model_card_sha256"


@dataclass(frozen=True)
class Card:
    backbone: BackboneConfig  # its `weights` are the file's: none is said here
    weights_fingerprint: str
    content: dict[str, Any]  # all of it


def make_card(summary: dict[str, Any], classes: tuple[str, ...], weights_fingerprint: str) -> dict[str, Any]:
    """`summary`: of the run that trained the network; `weights_fingerprint`: of what it trained."""
    config = summary["config"]
    measured = {key: summary[key] for key in ("test_top1", "val_top1") if summary.get(key) is not None}
    return {
        "format": FORMAT,
        "network": {key: value for key, value in config["backbone"].items() if key != "weights"},
        "weights_fingerprint": weights_fingerprint,
        "began_with": summary["weights_fingerprint"],  # "none": random weights
        "classes": list(classes),
        "data": {
            "name": config["dataset"]["name"],
            "fingerprint": summary["dataset_fingerprint"],
            **{key: summary[key] for key in ("n_train", "n_val", "n_test")},
        },
        "measured": measured,
        **{key: summary[key] for key in ("run_id", "iterations", "seed", "command", "versions", "git_commit")},
    }


def metadata_of(card: dict[str, Any]) -> dict[str, str]:
    """For the safetensors file."""
    text = json.dumps(card)
    return {KEY: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()}


def in_words(card: dict[str, Any]) -> str:
    """MODEL_CARD.md."""
    network, data, measured = card["network"], card["data"], card["measured"]
    counts = f"{data['n_train']:,} training, {data['n_val']:,} validation and {data['n_test']:,} test images"
    parts = {"test_top1": ("test", data["n_test"]), "val_top1": ("validation", data["n_val"])}
    accuracy = [
        f"{value:.2f} % of n = {parts[key][1]:,} {parts[key][0]} images (top-1, last iteration, one run)"
        for key, value in measured.items()
    ]
    began = "random weights" if card["began_with"] == "none" else f"weights {card['began_with']}"
    rows = {
        "Network": f"{network['name']} for {network['image_size']}-pixel images, from {began}",
        "Input": f"RGB in 0..1, minus {network['mean']}, divided by {network['std']}",
        "Taps": ", ".join(network["taps"]),
        "Classes": f"{len(card['classes']):,}: {few(card['classes'])}",
        "Data set": f"{data['name']}: {counts}",
        "Data fingerprint": data["fingerprint"],
        "Accuracy": "; ".join(accuracy) or "not measured",
        "Weights fingerprint": card["weights_fingerprint"],
        "Trained by": f"run {card['run_id']}, {card['iterations']:,} iterations, seed {card['seed']}",
        "Command": card["command"],
        "Versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
        "Commit": card["git_commit"] or "not known",
    }
    lines = [f"# {network['name']}, trained on {data['name']}", ""]
    lines += [f"- {name}: {spelled_out(str(value))}" for name, value in rows.items()]
    lines += ["", f"A source network for delta-run: `source=path/to/model{SUFFIX}`, where this file lies.", ""]
    return "\n".join(lines)


def read_card(path: Path) -> Card:
    """Of a file that delta-pretrain wrote. Raises UserError if there is none that can be used."""
    if not path.is_file():
        raise UserError(f"source: there is no file {path}.")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"source: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if KEY not in metadata:
        raise UserError(
            f"source: {path} has no model card, as delta-pretrain writes it. Of other files name the network: "
            f"source=NAME:{path}, with a NAME of conf/backbone."
        )
    text = metadata[KEY]
    try:
        if hashlib.sha256(text.encode()).hexdigest() != metadata.get(DIGEST):
            raise ValueError("its checksum is wrong")
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"it is of format {content['format']!r}, this version reads {FORMAT}")
        if "${" in text:  # which OmegaConf would look up, here
            raise ValueError("it refers to something outside of it")
        known = {field.name for field in fields(BackboneConfig)} - {"weights"}
        if unknown := content["network"].keys() - known:
            raise ValueError(f"{few(sorted(unknown))} is not known of a network")
        values = content["network"] | {"weights": str(path)}
        backbone = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BackboneConfig), OmegaConf.create(values)))
        if OmegaConf.missing_keys(OmegaConf.structured(backbone)):
            raise ValueError("it is not complete")
        return Card(backbone, str(content["weights_fingerprint"]), content)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OmegaConfBaseException,
        UserError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"source: the model card of {path} cannot be used: {reason}") from None

"""`source=`: the source networks that a command names."""

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..common.errors import UserError
from ..common.options import OptionError, from_mapping, require
from ..models.sources import SourceConfig
from ..models.zoo import BackboneConfig, options_of_backbone
from ..records.cards import SUFFIX, read_card

CONF = "delta_transfer.conf"


def choices(group: str, config_dir: str | None = None) -> dict[str, Traversable]:
    """The files of a group in conf/ and in the folder `config_dir`, by their choices in order. The folder's count."""
    found: dict[str, Traversable] = {}
    for place in (files(CONF), *([Path(config_dir)] if config_dir else [])):
        if (folder := place / group).is_dir():
            found |= {e.name.removesuffix(".yaml"): e for e in folder.iterdir() if e.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def sources_of(entries: object) -> list[SourceConfig]:
    """The source networks that `source=` names, in its order.

    An entry is one of
        path/model.safetensors             written by delta-pretrain, or its run's folder; its model card says which
                                           network it is
        resnet34                           a file of conf/backbone, with its weights and taps
        resnet34:path/weights.safetensors  the same with other weights
        {use: one of these, taps: [...]}   the same with other taps

    Raises UserError for anything else, and for a network or a model card that does not exist.
    """
    named = entries if isinstance(entries, list) else [entries]
    require(bool(named), "source=[] names no network: source=null means the one that backbone.weights names.")
    found: list[SourceConfig] = []
    for entry in named:
        backbone, expected = _described(_checked(entry))
        # The second and later ones of a network are called resnet32_2, resnet32_3.
        count = 1 + sum(other.backbone.name == backbone.name for other in found)
        name = backbone.name if count == 1 else f"{backbone.name}_{count}"
        found.append(SourceConfig(name=name, backbone=backbone, expected=expected))
    return found


def _checked(entry: object) -> dict[str, Any]:
    mapping = entry if isinstance(entry, dict) else {"use": entry}
    taps = mapping.get("taps", [])
    named = mapping.keys() <= {"use", "taps"} and isinstance(mapping.get("use"), str) and bool(mapping["use"])
    if not (named and isinstance(taps, list) and all(isinstance(tap, str) for tap in taps)):
        raise OptionError(
            "source",
            "source is a .safetensors file of delta-pretrain, a name of conf/backbone, NAME:WEIGHTS, or "
            f"{{use: one of these, taps: [...]}}, or a list of them, got {entry!r}.",
        )
    return mapping


def _described(entry: dict[str, Any]) -> tuple[BackboneConfig, str | None]:
    """The network of an entry, and the fingerprint of its weights if a model card gives it."""
    use: str = entry["use"]
    of_run = Path(use).expanduser() / f"model{SUFFIX}"
    if "/" in use and of_run.is_file():  # a name without a slash names a network
        use = str(of_run)
    name, _, weights = use.partition(":")
    expected = None
    if name.endswith(SUFFIX):
        card = read_card(Path(use).expanduser())
        try:
            backbone = from_mapping(BackboneConfig, card["network"] | {"weights": use})
        except (OptionError, TypeError) as error:
            raise UserError(f"source: the model card of {use} cannot be used: {error}") from None
        expected = card["weights_fingerprint"]
    else:
        backbone = named_backbone(name)
        backbone = backbone.replace(weights=weights or backbone.weights)
    try:
        return backbone.replace(taps=list(entry.get("taps", backbone.taps))), expected
    except UserError as error:
        raise UserError(f"source={use}: {error}") from None


def networks() -> list[str]:
    """The files of conf/backbone that stand for one network and not for a whole library."""
    return [name for name in choices("backbone") if name not in ("timm", "torchvision")]


def named_backbone(name: str) -> BackboneConfig:
    """The network of a file of conf/backbone."""
    known = networks()
    require(
        name in known,
        f"source={name} is neither a {SUFFIX} file of delta-pretrain nor one of conf/backbone: {', '.join(known)}.",
    )
    values = OmegaConf.create((files(CONF) / "backbone" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(values, DictConfig)
    del values["defaults"]  # it names the schema
    return from_mapping(options_of_backbone(name), OmegaConf.to_container(values))  # type: ignore[arg-type]

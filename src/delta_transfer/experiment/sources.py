"""Source networks other than the target's own starting point: `source=` of a run. Nothing here imports torch.

An entry is one of
    path/model.safetensors                 written by delta-pretrain, or its run's folder: its model card says which
                                           network it is
    resnet34                               a file of conf/backbone, with its weights and taps
    resnet34:path/weights.safetensors      the same with weights of its own
    {use: one of these, taps: [layer1, layer2, layer3, layer4]}        the same with taps of its own
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..common.console import log
from ..common.errors import UserError
from ..common.options import require
from ..config import BackboneConfig, RunConfig
from ..records.cards import SUFFIX, Card, read_card

if TYPE_CHECKING:
    from ..methods.base import MapShapes, Stage
    from ..models import FrozenSources, Network


@dataclass(frozen=True)
class Source:
    """A source network by its configuration; `name` is unique among those of a run."""

    name: str
    backbone: BackboneConfig
    card: Card | None  # of a network of delta-pretrain's


@dataclass(frozen=True)
class Loaded:
    """A source network with its weights and the head that they came with."""

    name: str
    backbone: BackboneConfig
    network: "Network"
    fingerprint: str  # of its weights

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides its maps."""
        kept = {key: value for key, value in vars(self.backbone).items() if key in ("taps", "mean", "std")}
        return {"name": self.name, "network": self.backbone.name, "weights": self.fingerprint} | kept

    @property
    def record(self) -> dict[str, Any]:
        """For summary.json."""
        kept = {"weights_fingerprint": self.fingerprint, "weights": self.backbone.weights, "taps": self.backbone.taps}
        return {"name": self.name, "network": self.backbone.name} | kept


def sources_of(entries: Sequence[str | dict] | None) -> list[Source]:
    """What `source` names, in its order. Raises UserError for a network or a model card that is not there."""
    found: list[Source] = []
    for entry in entries or ():
        backbone, card = _described(entry)
        # The second and later ones of a network: resnet32_2, resnet32_3.
        count = 1 + sum(other.backbone.name == backbone.name for other in found)
        found.append(Source(backbone.name if count == 1 else f"{backbone.name}_{count}", backbone, card))
    return found


def _described(entry: str | dict) -> tuple[BackboneConfig, Card | None]:
    if isinstance(entry, dict):
        backbone, card = _described(entry["use"])
        try:
            return replace(backbone, taps=list(entry.get("taps", backbone.taps))), card
        except UserError as error:
            raise UserError(f"source={entry['use']}: {error}") from None
    of_run = Path(entry).expanduser() / f"model{SUFFIX}"
    if "/" in entry and of_run.is_file():  # a name without a slash is that of a network
        entry = str(of_run)
    name, _, weights = entry.partition(":")
    if name.endswith(SUFFIX):
        card = read_card(Path(entry).expanduser())
        return replace(card.backbone, weights=entry), card
    backbone = named_backbone(name)
    return replace(backbone, weights=weights or backbone.weights), None


def named_backbone(name: str) -> BackboneConfig:
    """Of a file of conf/backbone."""
    folder = files("delta_transfer.conf") / "backbone"
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    require(
        name in known,
        f"source={name} is neither a {SUFFIX} file of delta-pretrain's nor one of conf/backbone: {', '.join(known)}.",
    )
    values = OmegaConf.create((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    del values["defaults"]  # the schema, which is this one
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BackboneConfig), values))
    except OmegaConfBaseException as error:
        raise UserError(f"conf/backbone/{name}.yaml: {str(error).splitlines()[0]}") from None


def with_weights(entries: Sequence[str | dict] | None, instead_of: str, file: str) -> list[str | dict] | None:
    """The entries, with `file` for weights called `instead_of`."""

    def changed(entry: str | dict) -> str | dict:
        if isinstance(entry, dict):
            return entry | {"use": changed(entry["use"])}
        backbone, _ = _described(entry)
        return f"{entry.partition(':')[0]}:{file}" if backbone.weights == instead_of else entry

    return entries and [changed(entry) for entry in entries]


def check_sources(config: RunConfig, stages: "Sequence[Stage]") -> None:
    """Raises UserError unless the method can do with the sources that there are, or with none."""
    methods = [stage.regularizer for stage in stages]
    reg = f"reg={config.reg.name}"
    require(
        config.source is None or all(method.any_source for method in methods),
        f"{reg} starts at its source network, which is backbone.weights: it takes no other (source=null).",
    )
    # The other methods start from the source: there a random one is at least what it says.
    needing = any(method.needs_source and method.any_source for method in methods)
    require(
        config.source is not None or config.backbone.weights != "none" or not needing,
        f"{reg} learns from a source network, but backbone.weights=none is a random one: name a source, e.g. "
        "source=resnet34 or a file of delta-pretrain's.",
    )
    if config.source is not None and config.backbone.weights != "none":
        log.info(
            f"The target starts from weights of its own, {config.backbone.weights}. The published targets of methods "
            "with a source= start at random (backbone.weights=none), and their taps are behind a ReLU (backbone.taps)."
        )


def shapes_of(sources: Sequence[Loaded], batch: int, image_size: int, with_logits: bool) -> "MapShapes":
    """Of the maps and logits that `frozen` returns, without the batch: (C, H, W) of name/tap, (K,) of name/logits."""
    shapes = {}
    for source in sources:
        maps = source.network.map_shapes(batch, image_size, training=False)
        logits = {"logits": (source.network.classes,)} if with_logits else {}
        shapes |= {f"{source.name}/{key}": shape for key, shape in (maps | logits).items()}
    return shapes


def frozen(sources: Sequence[Loaded], target: BackboneConfig, with_logits: bool, precision: str) -> "FrozenSources":
    """The networks as training runs them, on images normalised as `target` says. `sources` are left alone."""
    from ..models import FrozenSources, frozen_maps

    maps = {source.name: frozen_maps(source.network, with_logits, precision) for source in sources}
    normalised = {source.name: (source.backbone.mean, source.backbone.std) for source in sources}
    return FrozenSources(maps, normalised, (target.mean, target.std))


def load_sources(config: RunConfig, tapped: bool) -> list[Loaded] | None:
    """Those of `config.source`; None for null.

    Raises UserError for weights that are not there or do not fit, and for want of taps where maps are wanted.
    """
    from ..models.zoo import build_source
    from ..records.checked import fingerprint

    if config.source is None:
        return None
    loaded = []
    for source in sources_of(config.source):
        require(source.backbone.weights != "none", f"source={source.name} has no weights: backbone.weights is none.")
        require(bool(source.backbone.taps) or not tapped, f"source={source.name} has no taps to compare with.")
        try:
            network = build_source(source.backbone, 0, tapped=tapped)
        except UserError as error:
            raise UserError(f"source={source.name}: {error}") from None
        weights = fingerprint(network.weights())
        if source.card is not None:
            require(
                source.card.weights_fingerprint == weights,
                f"{source.backbone.weights}: the model card is of other weights than those in the file.",
            )
        loaded.append(Loaded(source.name, source.backbone, network, weights))
    return loaded

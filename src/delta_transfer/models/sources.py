"""Source networks that the target does not start from: `source=` of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..common.errors import UserError
from ..common.options import Options, option, require
from ..records.checked import fingerprint
from .frozen import FrozenSources, frozen_maps
from .taps import Network
from .zoo import BackboneConfig, build_source


@dataclass
class SourceConfig(Options):
    """A source network by its configuration."""

    key: ClassVar[str] = "source"

    name: str = option(help="name of the network, unique among the sources of a run")
    backbone: BackboneConfig = option(help="the network, its weights, taps and normalisation")
    expected: str | None = option(None, "fingerprint of the weights, from the model card beside them")


@dataclass(frozen=True)
class SourceNetwork:
    """A source network with its weights and the head that they came with."""

    name: str
    backbone: BackboneConfig
    network: Network
    fingerprint: str  # of its weights

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides its maps."""
        kept = {key: value for key, value in vars(self.backbone).items() if key in ("taps", "mean", "std")}
        return {"name": self.name, "network": self.backbone.name, "weights": self.fingerprint} | kept

    @property
    def record(self) -> dict[str, Any]:
        """The network's entry in summary.json."""
        kept = {"weights_fingerprint": self.fingerprint, "weights": self.backbone.weights, "taps": self.backbone.taps}
        return {"name": self.name, "network": self.backbone.name} | kept


def load_sources(entries: Sequence[SourceConfig], tapped: bool) -> list[SourceNetwork]:
    """The networks of `entries`, in their order. tapped: whether their feature maps are needed.

    Raises UserError for weights that are missing or do not fit, and for a network without taps if maps are needed.
    """
    loaded = []
    for entry in entries:
        require(entry.backbone.weights != "none", f"source={entry.name} has no weights: backbone.weights is none.")
        require(bool(entry.backbone.taps) or not tapped, f"source={entry.name} has no taps to compare with.")
        try:
            network = build_source(entry.backbone, 0, tapped=tapped)
        except UserError as error:
            raise UserError(f"source={entry.name}: {error}") from None
        weights = fingerprint(network.weights())
        require(
            entry.expected in (None, weights),
            f"{entry.backbone.weights}: the model card describes other weights than those in the file.",
        )
        loaded.append(SourceNetwork(entry.name, entry.backbone, network, weights))
    return loaded


def shapes_of(
    sources: Sequence[SourceNetwork], batch: int, image_size: int, with_logits: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of what `frozen` returns, without the batch: (C, H, W) of name/tap, (K,) of name/logits."""
    shapes: dict[str, tuple[int, ...]] = {}
    for source in sources:
        shapes |= {
            f"{source.name}/{tap}": shape
            for tap, shape in source.network.map_shapes(batch, image_size, training=False).items()
        }
        if with_logits:
            shapes[f"{source.name}/logits"] = (source.network.classes,)
    return shapes


def frozen(
    sources: Sequence[SourceNetwork], target: BackboneConfig, with_logits: bool, precision: str
) -> FrozenSources:
    """The networks as training runs them, on images normalised as `target` says. `sources` stay as they are."""
    maps = {source.name: frozen_maps(source.network, with_logits, precision) for source in sources}
    normalised = {source.name: (source.backbone.mean, source.backbone.std) for source in sources}
    return FrozenSources(maps, normalised, (target.mean, target.std))

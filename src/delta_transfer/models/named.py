"""A network of timm or torchvision by its name alone: the library supplies the rest."""

import difflib
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any

from torch import nn

from ..common.errors import UserError
from ..common.options import LARGEST_SIDE, option
from .layouts import LAYOUTS
from .libraries import HUB, INTERPOLATIONS, name_on_hub, said_by_timm, said_by_torchvision
from .tapping import Tappable, chain_of, choose_taps, find_head, layout_of, run_once
from .zoo import BackboneConfig, construct, untrained

AUTO = "auto"


@dataclass
class NamedBackboneConfig(BackboneConfig):
    """A network of a library by its name. The library supplies the values of options that are auto, 0 or empty."""

    weights: str = option("pretrained", "pretrained: the library's own; a file with a state dict; or none")
    image_size: int = option(
        0, "side of the crop that the network sees, in pixels; 0: the library's", at_least=0, at_most=LARGEST_SIDE
    )
    resize: int = option(
        0, "size of the stored image that is cropped; 0: the library's share", at_least=0, at_most=LARGEST_SIDE
    )
    mean: list[float] = option([], "mean of each colour channel, in 0..1; empty: the library's")
    std: list[float] = option([], "their standard deviation, in 0..1; empty: the library's", above=0)
    head: str = option(AUTO, "name of the classification layer; auto: found")
    taps: list[str] = option([AUTO], "modules whose outputs are tapped; [auto]: found (delta-data taps)")
    interpolation: str = option(AUTO, "how images are resized; auto: the library's", choices=(AUTO, *INTERPOLATIONS))
    layout: str = option(AUTO, "the axes of tapped maps; auto: found", choices=(AUTO, *LAYOUTS))
    prefix_tokens: int = option(
        -1, "number of class tokens in front of each map that are left out; -1: all", at_least=-1
    )

    def check(self) -> None:
        """`complete` checks the values."""

    def complete(self) -> BackboneConfig:
        """The options with the library's values. Raises UserError for a value that cannot be found."""
        name, weights = self.name, self.weights
        if self.library == "timm":
            if name.startswith(HUB):
                name, weights = name_on_hub(name), name if weights == "pretrained" else weights
            said = said_by_timm(name)
        else:
            said = said_by_torchvision(name, weights)
            weights = "DEFAULT" if weights == "pretrained" else weights
        side = self.image_size or said["image_size"]
        given = {key: value for key, value in vars(self).items() if key in said and value not in (0, AUTO, [])}
        values = said | {"image_size": side, "resize": max(side, round(side / said["crop"]))} | given
        crop = values.pop("crop")
        assert crop
        partial = dict(
            library=self.library, name=name, weights=weights, taps=[], head="?", drop_path=self.drop_path
        ) | {key: values[key] for key in ("image_size", "resize", "mean", "std", "interpolation")}
        found = _structure(self.library, name, side)
        head = found.head if self.head == AUTO else self.head
        taps = list(found.taps if self.taps == [AUTO] else self.taps)
        shapes = {entry.name: entry.shape for entry in found.ran}
        if missing := [tap for tap in taps if tap not in shapes]:
            near = difflib.get_close_matches(missing[0], shapes, 3)
            raise UserError(
                f"backbone.taps: {name} has no layer {missing[0]!r} that runs once"
                f"{': did you mean ' + ', '.join(near) + '?' if near else '.'} delta-data taps lists all layers."
            )
        layout = (
            self.layout if self.layout != AUTO else "BCHW" if not taps else layout_of([shapes[tap] for tap in taps])
        )
        if layout is None:
            raise UserError(f"backbone.taps: the maps of {name} differ in their axes: tap others (delta-data taps).")
        tokens = max(0, self.prefix_tokens)
        if layout == "BNC" and self.prefix_tokens < 0:  # some networks have a class token only in their last layers
            tokens = found.prefix_tokens if isqrt(shapes[taps[0]][0]) ** 2 != shapes[taps[0]][0] else 0
        return BackboneConfig(**partial | {"head": head, "taps": taps, "layout": layout, "prefix_tokens": tokens})


@dataclass(frozen=True)
class Structure:
    """The layers of a network that options name."""

    head: str
    taps: tuple[str, ...]  # the default taps
    ran: tuple[Tappable, ...]
    prefix_tokens: int


@lru_cache
def _structure(library: str, name: str, image_size: int) -> Structure:
    bare = BackboneConfig(name, "none", image_size, image_size, head="?", taps=[], library=library)
    model = untrained(bare)
    try:
        ran = run_once(model, image_size)
    except UserError:  # some models ask for values of their parameters
        model = construct(bare, 1000)
        ran = run_once(model, image_size)
    if library == "timm":
        classifier: Any = model.get_classifier()  # type: ignore[operator]
        names = [module_name for module_name, module in model.named_modules() if module is classifier]
        if not names or not isinstance(classifier, nn.Linear):
            kind = type(classifier).__name__
            raise UserError(f"backbone.name={name}: its head is not a single linear layer, but {kind}.")
        head, stages = names[0], _stages_of_timm(model)
        tokens = int(getattr(model, "num_prefix_tokens", 0))
    else:
        head, stages, tokens = find_head(model, ran), [], int(hasattr(model, "class_token"))
    stages = stages or chain_of(model, ran)
    return Structure(head, tuple(choose_taps(model, ran, stages, image_size)), tuple(ran), tokens)


def tappable(config: BackboneConfig) -> list[Tappable]:
    """The modules of the network that can be tapped, in the order in which they run: maps of rank 3 or 4."""
    ran = _structure(config.library, config.name, config.image_size).ran
    return [entry for entry in ran if len(entry.shape) in (2, 3)]


def _stages_of_timm(model: nn.Module) -> list[str]:
    entries = getattr(model, "feature_info", None)
    entries = getattr(entries, "info", entries) or []
    names = [str(entry.get("module", "")) for entry in entries if isinstance(entry, dict)]
    known = dict(model.named_modules())
    return names if names and all(name in known for name in names) else []

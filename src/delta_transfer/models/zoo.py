"""Networks by name, their options and their source weights."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import ClassVar
from urllib.error import URLError

import torch
from torch import nn

from ..common.errors import UserError
from ..common.options import LARGEST_SIDE, MISSING, Options, option
from .graph_networks import GRAPH_NETWORKS, GraphEncoder, GraphNetwork
from .resnet32 import ResNet32
from .small_resnet import SmallResNet
from .taps import Network
from .vgg9 import VGG9
from .weights import SUFFIXES, StateDict, fitted_names, is_file_name, read_file

# Networks that are not torchvision's: name -> constructor taking num_classes.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "small_resnet": SmallResNet,
    "resnet32": ResNet32,
    "vgg9_bn": VGG9,
    "small_vgg": partial(VGG9, width=16),
    **GRAPH_NETWORKS,
}


@dataclass
class BackboneConfig(Options):
    key: ClassVar[str] = "backbone"
    inputs: ClassVar[str] = "images"  # what such networks take

    name: str = option(help="torchvision's name of the network, or a network of models/zoo.py")
    weights: str = option(help="torchvision's name of the weights, a file with a state dict, none, or glyphs")
    image_size: int = option(help="side of the crop that the network sees, in pixels", above=0, at_most=LARGEST_SIDE)
    resize: int = option(help="size of the stored image that is cropped, in pixels", above=0, at_most=LARGEST_SIDE)
    mean: list[float] = option([0.485, 0.456, 0.406], "mean of each colour channel of the training images, in 0..1")
    std: list[float] = option([0.229, 0.224, 0.225], "standard deviation of each colour channel, in 0..1", above=0)
    head: str = option(help="name of the classification layer, a torch.nn.Linear")
    taps: list[str] = option(help="names of the modules whose outputs are the tapped feature maps")
    aux_head: str | None = option(None, "name of Inception's auxiliary classification layer")
    aux_weight: float = option(
        0.0, "weight of the auxiliary head's cross-entropy; 0 leaves the head out of the run", at_least=0
    )

    def check(self) -> None:
        self.require(
            self.resize >= self.image_size,
            "resize",
            f"backbone.resize ({self.resize}) must be at least backbone.image_size ({self.image_size}).",
        )
        self.require(len(self.mean) == len(self.std) == 3, "mean", "backbone.mean and backbone.std need three values.")
        self.require(len(set(self.taps)) == len(self.taps), "taps", f"backbone.taps names a layer twice: {self.taps}.")
        self.require(
            self.aux_weight == 0 or self.aux_head is not None,
            "aux_weight",
            f"backbone.aux_weight is {self.aux_weight}, but this backbone has no auxiliary head.",
        )

    def network_of(self, model: nn.Module, tapped: bool) -> Network:
        """`model` with its head and, if wanted, its tapped maps."""
        aux_head = self.aux_head if self.aux_weight > 0 else None
        return Network(model, self.head, self.taps if tapped else (), aux_head)


@dataclass
class GraphBackboneConfig(BackboneConfig):
    """A network of models/graph_networks.py. Graphs have no pixels."""

    inputs: ClassVar[str] = "graphs"

    name: str = option(help="gcn, gin, sage or gat")
    weights: str = option("none", "a file with a state dict as Hu et al. publish it, or none")
    image_size: int = option(1, "of no use for graphs", at_least=1, at_most=1)
    resize: int = option(1, "of no use for graphs", at_least=1, at_most=1)
    dropout: float = option(0.5, "probability of dropout after each layer", at_least=0, below=1)

    def check(self) -> None:
        super().check()
        self.require(
            self.name == MISSING or self.name in GRAPH_NETWORKS,
            "name",
            f"backbone.name={self.name} is no graph network: there is only {', '.join(GRAPH_NETWORKS)}.",
        )

    def network_of(self, model: nn.Module, tapped: bool) -> Network:
        assert isinstance(model, GraphEncoder)
        model.dropout = self.dropout
        return GraphNetwork(model, self.head, self.taps if tapped else ())


def options_of_backbone(name: object) -> type[BackboneConfig]:
    """The options of the network of that name."""
    return GraphBackboneConfig if name in GRAPH_NETWORKS else BackboneConfig


def build_source(config: BackboneConfig, seed: int, tapped: bool = True) -> Network:
    """The source network with the head its weights came with; random weights from `seed` where there are none.

    `tapped`: whether its feature maps are wanted.
    """
    state = read_weights(config)
    num_classes = 1000 if state is None else _classes_of(state, config)
    with torch.random.fork_rng(devices=[]):
        # A file without a head leaves the head random: the same one for every seed, it is part of the source.
        torch.manual_seed(seed if state is None else 0)
        model = _construct(config.name, num_classes=num_classes)
    if state is not None:
        _load(model, state, config)
    return config.network_of(model, tapped)


def untrained(name: str) -> nn.Module:
    """The network without values for its parameters, which costs nothing: for questions about its layers.

    Raises UserError for a name that no library has.
    """
    _require_known(name)
    with torch.device("meta"):
        return _construct(name, num_classes=1000)


def bare_network(name: str, num_classes: int, state: StateDict) -> nn.Module:
    """The network as its library builds it, in evaluation mode, with `state`, which has to fit exactly, not copied.

    Raises UserError for a name that no library has, RuntimeError for a state of another network.
    """
    _require_known(name)
    with torch.device("meta"):  # no time for random weights that nobody sees
        model = _construct(name, num_classes, **options_for(name, state))
    model.load_state_dict(state, strict=True, assign=True)
    return model.float().eval().requires_grad_(False)


def options_for(name: str, state: StateDict) -> dict[str, bool]:
    """What torchvision's constructor must be told, so that `state` fits: files leave out auxiliary branches."""
    has_aux = any(key.startswith(("AuxLogits.", "aux1.")) for key in state)
    return {"aux_logits": False} if name in ("inception_v3", "googlenet") and not has_aux else {}


def read_weights(config: BackboneConfig) -> StateDict | None:
    """The state dict that `backbone.weights` names, floating point values as fp32; None for "none"."""
    weights = config.weights
    _require_known(config.name)
    if weights == "none":
        return None
    if is_file_name(weights):
        path = Path(weights).expanduser()
        own = untrained(config.name).state_dict()
        backbone = [name for name in own if not name.startswith(f"{config.head}.")]
        return fitted_names(read_file(path), backbone, f"backbone.weights: {path}")
    if config.name in NETWORKS:
        raise UserError(f"backbone.weights={weights} is neither a file ({', '.join(SUFFIXES)}) nor none.")
    return _download(config.name, weights)


def not_downloaded(config: BackboneConfig) -> str | None:
    """Why torchvision's weights would have to be fetched first; None if they are here or no download is meant."""
    if config.name in NETWORKS or config.weights == "none" or is_file_name(config.weights):
        return None
    enum = torchvision_models().get_model_weights(config.name)
    choice = config.weights.split(".")[-1]
    if choice not in enum.__members__:
        return None  # read_weights says what is wrong with it
    file = Path(torch.hub.get_dir()) / "checkpoints" / enum[choice].url.split("/")[-1]
    return None if file.exists() else f"torchvision's {enum[choice]} will be downloaded from {enum[choice].url}"


def torchvision_models() -> ModuleType:
    """torchvision.models. It takes as long to import as torch, and neither help nor a misspelt key needs it."""
    from torchvision import models

    return models


def _classes_of(state: StateDict, config: BackboneConfig) -> int:
    """The number of classes of the head in `state`, or 1000 without a head.

    Raises UserError if the head's shape does not fit the network.
    """
    weight = state.get(f"{config.head}.weight")
    if weight is None:
        return 1000
    with torch.device("meta"):  # shapes alone
        own = dict(_construct(config.name, num_classes=1000).named_parameters()).get(f"{config.head}.weight")
    if own is None:  # Network says so
        return 1000
    if weight.dim() != own.dim() or weight.shape[1:] != own.shape[1:] or not weight.numel():
        raise UserError(
            f"backbone.weights={config.weights} does not fit {config.name}: {config.head}.weight has the shape "
            f"{tuple(weight.shape)}, which should be (classes, {', '.join(map(str, own.shape[1:]))})."
        )
    return len(weight)


def _construct(name: str, num_classes: int, **options: bool) -> nn.Module:
    if name in NETWORKS:
        return NETWORKS[name](num_classes)
    options |= {"transform_input": False, "init_weights": True} if name == "inception_v3" else {}
    model: nn.Module = torchvision_models().get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def _require_known(name: str) -> None:
    if name not in NETWORKS and name not in torchvision_models().list_models(module=torchvision_models()):
        raise UserError(f"backbone.name={name}: neither torchvision nor delta-transfer has a network of that name.")


def _download(name: str, weights: str) -> StateDict:
    """torchvision's own weights by enum name, e.g. IMAGENET1K_V1 or ResNet101_Weights.IMAGENET1K_V1."""
    enum = torchvision_models().get_model_weights(name)
    choice = weights.split(".")[-1]
    if choice not in enum.__members__:
        raise UserError(
            f"backbone.weights={weights}: {name} has the torchvision weights {', '.join(enum.__members__)}; "
            f"or name a file ({', '.join(SUFFIXES)}), or none."
        )
    try:
        # The checksum is compared after a download only; the file may also have lain there.
        return enum[choice].get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"torchvision's {enum[choice]}, downloaded before, is damaged: remove "
            f"{Path(torch.hub.get_dir()) / 'checkpoints' / enum[choice].url.split('/')[-1]}."
        ) from error
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the checksum does not match
        raise UserError(
            f"Could not download torchvision's {enum[choice]} ({error}). On a machine with internet access fetch "
            f"{enum[choice].url} and pass the file: backbone.weights=/path/to/{enum[choice].url.split('/')[-1]}"
        ) from error


def _load(model: nn.Module, state: StateDict, config: BackboneConfig) -> None:
    """Strict, except that heads may be absent (they are replaced anyway) and BatchNorm's step counter is optional."""
    own = model.state_dict()
    heads = tuple(f"{head}." for head in (config.head, config.aux_head) if head)
    # An auxiliary branch that is not computed may be absent altogether: our own files leave it out.
    optional = (*heads, config.aux_head.split(".")[0] + ".") if config.aux_head and not config.aux_weight else heads
    missing = [
        name
        for name in own
        if name not in state and not name.startswith(optional) and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in own]
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape and not name.startswith(heads)
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(
            f"backbone.weights={config.weights} does not fit {config.name}. Keys " + "; ".join(problems) + "."
        )
    usable = {name: value for name, value in state.items() if value.shape == own[name].shape}
    model.load_state_dict(usable, strict=False)

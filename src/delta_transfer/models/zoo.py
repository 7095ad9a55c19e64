"""Networks by name, their options and their source weights."""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import ClassVar
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ..common.console import shorten_list
from ..common.errors import UserError
from ..common.options import LARGEST_SIDE, Options, option
from ..records.checked import load_with_checksum
from .resnet32 import ResNet32
from .small_resnet import SmallResNet
from .taps import Network
from .vgg9 import VGG9

StateDict = dict[str, Tensor]

# Networks that are not torchvision's: name -> constructor taking num_classes.
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "small_resnet": SmallResNet,
    "resnet32": ResNet32,
    "vgg9_bn": VGG9,
    "small_vgg": partial(VGG9, width=16),
}
# What values of a network are. Others (quantised, complex, ...) mean something that is not in the file.
NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
NUMBERS |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


@dataclass
class BackboneConfig(Options):
    key: ClassVar[str] = "backbone"

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
    aux_head = config.aux_head if config.aux_weight > 0 else None
    return Network(model, config.head, config.taps if tapped else (), aux_head)


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
    if weights.endswith((".pth", ".pt", ".safetensors")):
        return _read_file(Path(weights).expanduser())
    if config.name in NETWORKS:
        raise UserError(f"backbone.weights={weights} is neither a .pth or .safetensors file nor none.")
    return _download(config.name, weights)


def not_downloaded(config: BackboneConfig) -> str | None:
    """Why torchvision's weights would have to be fetched first; None if they are here or no download is meant."""
    if config.name in NETWORKS or config.weights == "none" or config.weights.endswith((".pth", ".pt", ".safetensors")):
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
            "or name a .pth or .safetensors file, or none."
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


def _read_file(path: Path) -> StateDict:
    if not path.is_file():
        raise UserError(f"backbone.weights: there is no file {path}.")
    try:
        state = load_with_checksum(path)[0] if path.suffix == ".safetensors" else load_pickled(path)
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"backbone.weights: {path} is not a state dict that can be read safely: {reason}") from error
    return _checked(state, path)


def load_pickled(path: Path) -> object:
    """What torch.save wrote, on the CPU: no code of the file runs, and nothing in it is larger than the file.

    Raises nearly anything for a file that is damaged or was not written by torch.save.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            # torch.load would also read records that are compressed or overlap, which torch.save does not make.
            if sum(record.file_size for record in file.infolist()) > path.stat().st_size:
                raise ValueError("its records are compressed, as in a decompression bomb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that are refused afterwards
        return torch.load(path, map_location="cpu", weights_only=True)


def _checked(state: object, path: Path) -> StateDict:
    """The state dict in what a file held, as fp32. Raises UserError unless it is one of plain, finite tensors."""
    for wrapper in ("state_dict", "model"):  # training checkpoints wrap the state dict
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"backbone.weights: {path} does not hold a state dict (names to tensors).")
    if odd := [name for name, value in state.items() if not _is_plain(value)]:
        raise UserError(
            f"backbone.weights: {path} has tensors that are not plain numbers (but sparse, quantised, complex or "
            f"without values): {shorten_list(odd)}."
        )
    # A tensor may repeat one stored number as often as it claims to. Twice: tensors may share their values.
    if (size := sum(value.numel() * value.element_size() for value in state.values())) > 2 * path.stat().st_size:
        raise UserError(
            f"backbone.weights: {path} is refused: its tensors claim {size / 1e6:,.1f} MB, the file has "
            f"{path.stat().st_size / 1e6:,.1f} MB."
        )
    plain = {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }
    if infinite := [name for name, value in plain.items() if not value.isfinite().all()]:
        raise UserError(
            f"backbone.weights: {path} has values that are not finite (NaN, infinity or beyond fp32) in "
            f"{shorten_list(infinite)}: nothing can be trained from it."
        )
    return plain


def _is_plain(value: Tensor) -> bool:
    stored = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    return stored and type(value) in (Tensor, nn.Parameter) and value.dtype in NUMBERS


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

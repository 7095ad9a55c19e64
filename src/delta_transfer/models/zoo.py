"""Networks by name and their source weights."""

import pickle
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from ..config import BackboneConfig
from ..errors import UserError
from ..tensor_files import read_sealed
from .small_resnet import SmallResNet
from .taps import Network

StateDict = dict[str, Tensor]

# Networks that are not torchvision's: name -> constructor taking num_classes.
NETWORKS = {"small_resnet": SmallResNet}


def build_source(config: BackboneConfig, seed: int, tapped: bool = True) -> Network:
    """The source network with the head its weights came with; random weights from `seed` where there are none.

    `tapped`: whether its feature maps are wanted.
    """
    state = read_weights(config)
    head_weight = None if state is None else state.get(f"{config.head}.weight")
    with torch.random.fork_rng(devices=[]):
        # A file without a head leaves the head random: the same one for every seed, it is part of the source.
        torch.manual_seed(seed if state is None else 0)
        model = _construct(config.name, num_classes=1000 if head_weight is None else len(head_weight))
    if state is not None:
        _load(model, state, config)
    aux_head = config.aux_head if config.aux_weight > 0 else None
    return Network(model, config.head, config.taps if tapped else (), aux_head)


def read_weights(config: BackboneConfig) -> StateDict | None:
    """The state dict that `backbone.weights` names, floating point values as fp32; None for "none"."""
    weights = config.weights
    if config.name not in NETWORKS and config.name not in torchvision.models.list_models(module=torchvision.models):
        raise UserError(
            f"backbone.name={config.name}: neither torchvision nor delta-transfer has a network of that name."
        )
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
    enum = torchvision.models.get_model_weights(config.name)
    choice = config.weights.split(".")[-1]
    if choice not in enum.__members__:
        return None  # read_weights says what is wrong with it
    file = Path(torch.hub.get_dir()) / "checkpoints" / enum[choice].url.split("/")[-1]
    return None if file.exists() else f"torchvision's {enum[choice]} will be downloaded from {enum[choice].url}"


def _construct(name: str, num_classes: int) -> nn.Module:
    if name in NETWORKS:
        return NETWORKS[name](num_classes)
    options = {"transform_input": False, "init_weights": True} if name == "inception_v3" else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def _download(name: str, weights: str) -> StateDict:
    """torchvision's own weights by enum name, e.g. IMAGENET1K_V1 or ResNet101_Weights.IMAGENET1K_V1."""
    enum = torchvision.models.get_model_weights(name)
    choice = weights.split(".")[-1]
    if choice not in enum.__members__:
        raise UserError(
            f"backbone.weights={weights}: {name} has the torchvision weights {', '.join(enum.__members__)}; "
            "or name a .pth or .safetensors file, or none."
        )
    try:
        return enum[choice].get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:  # RuntimeError: the checksum does not match
        raise UserError(
            f"Could not download torchvision's {enum[choice]} ({error}). On a machine with internet access fetch "
            f"{enum[choice].url} and pass the file: backbone.weights=/path/to/{enum[choice].url.split('/')[-1]}"
        ) from error


def _read_file(path: Path) -> StateDict:
    if not path.is_file():
        raise UserError(f"backbone.weights: there is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            state, _ = read_sealed(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"backbone.weights: {path} is not a state dict that can be read safely: {reason}") from error
    for wrapper in ("state_dict", "model"):  # training checkpoints wrap the state dict
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"backbone.weights: {path} does not hold a state dict (names to tensors).")
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }


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

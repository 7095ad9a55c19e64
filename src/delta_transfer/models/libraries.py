"""Networks of timm and torchvision by name: how to make them, their weights and their input."""

import difflib
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import torch
from torch import nn

from ..common.console import log_once
from ..common.errors import UserError
from ..records.weights import SUFFIXES, StateDict

HUB = "hf-hub:"
FREE = ("apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause")
INTERPOLATIONS = ("bilinear", "bicubic")


def torchvision_models() -> ModuleType:
    """torchvision.models, imported late: it takes as long as torch, and neither help nor a misspelt key needs it."""
    from torchvision import models

    return models


def timm_library() -> ModuleType:
    """timm. Raises UserError if it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError("backbone=timm needs the package timm: pip install 'delta-transfer[timm]'.") from None
    return timm


def no_drop_path(name: str) -> UserError:
    return UserError(f"backbone.drop_path: {name} has no drop path (stochastic depth).")


def timm_model(name: str, image_size: int, num_classes: int, drop_path: float | None = None) -> nn.Module:
    """A network of timm without weights, for images of `image_size` pixels.

    drop_path: the largest probability that a residual branch is left out of a training step. Raises UserError for an
    unknown name, and for a drop path of a network that has none.
    """
    timm = timm_library()
    known(name, "timm")
    options = {} if drop_path is None else {"drop_path_rate": drop_path}
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **options, **_size_of(name, image_size))
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        if "drop_path_rate" in str(error):
            raise no_drop_path(name) from None
        raise UserError(
            f"backbone.name={name}: timm cannot make it for images of {image_size} pixels "
            f"(backbone.image_size): {type(error).__name__}."
        ) from error
    return model


def _size_of(name: str, image_size: int) -> dict[str, int]:
    """timm's argument for the size of the images, which networks made for another size need; else {}."""
    said = timm_library().get_pretrained_cfg(name)
    fixed = said is not None and said.fixed_input_size and said.input_size[-1] != image_size
    return {"img_size": image_size} if fixed else {}


def timm_weights(name: str, weights: str, image_size: int) -> StateDict:
    """timm's own weights of a network, which it may download. Raises UserError if that fails."""
    timm = timm_library()
    said = timm.get_pretrained_cfg(name)
    where = weights.removeprefix(HUB) if weights.startswith(HUB) else said and said.hf_hub_id
    if not where and not (said and (said.url or said.file)):
        raise UserError(f"timm has no weights for {name}: set backbone.weights=FILE or none.")
    if said is not None and said.license and said.license not in FREE:
        log_once(f"{name}: the licence of its weights is {said.license}")
    try:
        chosen = weights if weights.startswith(HUB) else name
        made = timm.create_model(chosen, pretrained=True, **_size_of(name, image_size))
    except Exception as error:  # the hub, the connection or a file in the cache may fail
        words = f"{type(error).__name__} {error}"
        page = f"https://huggingface.co/{where}" if where else said.url
        if any(sign in words for sign in ("Gated", "401", "403")):
            raise UserError(
                f"The weights of {name} are given to those who accept their licence: do so on {page}, log in "
                "(hf auth login), and repeat the command."
            ) from error
        raise UserError(
            f"Could not download the weights of {name}. On a machine with internet access fetch model.safetensors from "
            f"{page} and pass the file: backbone.weights=/path/to/model.safetensors"
        ) from error
    return {name: value.detach() for name, value in made.float().state_dict().items()}


def timm_not_downloaded(name: str, weights: str) -> str | None:
    """Why timm's weights would have to be fetched first; None if they are here."""
    said = timm_library().get_pretrained_cfg(name)
    where = weights.removeprefix(HUB) if weights.startswith(HUB) else said and said.hf_hub_id
    if not where:
        return None
    from huggingface_hub import try_to_load_from_cache

    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(where, file), str) for file in files):
        return None
    return f"timm's weights of {name} will be downloaded from https://huggingface.co/{where}"


def torchvision_weights(name: str, weights: str) -> StateDict:
    """torchvision's own weights by enum name, e.g. IMAGENET1K_V1 or ResNet101_Weights.IMAGENET1K_V1."""
    enum = torchvision_models().get_model_weights(name)
    choice = weights.split(".")[-1]
    if choice not in enum.__members__:
        raise UserError(
            f"backbone.weights={weights}: {name} has the torchvision weights {', '.join(enum.__members__)}; "
            f"or name a file ({', '.join(SUFFIXES)}), or none."
        )
    try:
        # The checksum is compared only after a download, and not for a file that was there before.
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


def torchvision_not_downloaded(name: str, weights: str) -> str | None:
    """Why torchvision's weights would have to be fetched first; None if they are here, or no weights have that name."""
    enum = torchvision_models().get_model_weights(name)
    choice = weights.split(".")[-1]
    if choice not in enum.__members__:
        return None  # torchvision_weights reports the name
    file = Path(torch.hub.get_dir()) / "checkpoints" / enum[choice].url.split("/")[-1]
    return None if file.exists() else f"torchvision's {enum[choice]} will be downloaded from {enum[choice].url}"


def known(name: str, library: str, more: Sequence[str] = ()) -> None:
    """Raises UserError for a name that the library lacks, with the nearest names of the library and of `more`."""
    if library == "timm":
        timm = timm_library()
        architecture, _, tag = name.partition(".")
        tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
        if timm.is_model(architecture) and (not tag or tag in tags):
            return
        names = [f"{architecture}.{one}" for one in tags] if timm.is_model(architecture) else timm.list_models()
    else:
        models = torchvision_models()
        names = models.list_models(module=models)
        if name in names:
            return
    near = difflib.get_close_matches(name, [*names, *more], 5, cutoff=0.4)
    raise UserError(
        f"backbone.name={name}: {library} has no network of that name"
        + (f". The nearest are {', '.join(near)}." if near else ".")
    )


def said_by_timm(name: str) -> dict[str, Any]:
    known(name, "timm")
    said = timm_library().get_pretrained_cfg(name) or timm_library().data.config.PretrainedCfg()
    if len(said.input_size) != 3 or said.input_size[0] != 3 or said.input_size[1] != said.input_size[2]:
        raise UserError(f"backbone.name={name} takes inputs {tuple(said.input_size)}, not square images of 3 colours.")
    return {
        "image_size": said.input_size[-1],
        "crop": said.crop_pct or 0.875,
        "mean": list(said.mean),
        "std": list(said.std),
        "interpolation": said.interpolation if said.interpolation in INTERPOLATIONS else "bicubic",
        "resize": None,
    }


def said_by_torchvision(name: str, weights: str) -> dict[str, Any]:
    known(name, "torchvision")
    enum = torchvision_models().get_model_weights(name)
    members = enum.__members__
    chosen = members.get(weights.split(".")[-1]) or next(iter(members.values()), None)
    if weights == "pretrained" and members:
        chosen = enum.DEFAULT
    said = chosen.transforms() if chosen else None
    crop, size = (said.crop_size[0], said.resize_size[0]) if said else (224, 256)
    return {
        "image_size": crop,
        "crop": min(1.0, crop / size),
        "mean": list(said.mean) if said else [0.485, 0.456, 0.406],
        "std": list(said.std) if said else [0.229, 0.224, 0.225],
        "interpolation": said.interpolation.value if said else "bilinear",
        "resize": None,
    }


def name_on_hub(name: str) -> str:
    """timm's name of a network on the hub. Raises UserError without a connection."""
    from timm.models import load_model_config_from_hf

    try:
        _, architecture, arguments = load_model_config_from_hf(name.removeprefix(HUB))
    except Exception as error:  # the connection or the hub may fail
        raise UserError(f"backbone.name={name}: its description could not be read ({type(error).__name__}).") from error
    if arguments:
        raise UserError(f"backbone.name={name} needs {', '.join(arguments)}, which no option sets.")
    return str(architecture)


def renamed_by_timm(model: nn.Module, state: StateDict) -> StateDict:
    """`state` with the names and shapes of timm's `model`: many networks have a filter for their authors' own files.

    Raises UserError for a file of another network.
    """
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = {name: value.shape for name, value in model.state_dict().items() if not name.endswith((".weight", ".bias"))}
    own |= {name: value.shape for name, value in model.named_parameters()}
    fits = [state[name].shape == shape for name, shape in own.items() if name in state]
    if rename is None or (fits and sum(fits) >= len(own) - 4):  # all except the head, which may have other classes
        return state
    try:
        return dict(rename(state, model))
    except Exception as error:
        raise UserError(f"backbone.weights is of another network than {type(model).__name__}.") from error

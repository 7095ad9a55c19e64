"""last.pt: everything that a run needs to go on, sealed with a checksum.

There are no states of random number generators in it: the loop derives all randomness from (seed, iteration).
"""

import hashlib
import io
from pathlib import Path
from typing import IO, Any

import torch

from ..common.console import log
from ..common.hardware import device_name
from . import processes as distributed

FORMAT = 4  # 3: without the modules of earlier stages
DIGEST_BYTES = hashlib.sha256().digest_size


def write_checkpoint(file: IO[bytes], state: dict[str, Any], device: torch.device) -> None:
    """`state`: tensors, numbers, texts and containers of them. torch.save's file, then its sha256."""
    sealed = _Hashed(file)
    try:
        torch.save({"format": FORMAT, "made_with": made_with(device)} | state, sealed)
    except RuntimeError:  # what torch makes of an error while writing
        if sealed.error is not None:
            raise sealed.error from None
        raise
    file.write(sealed.digest.digest())


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state in `path`, on the CPU; None if there is none, or none that can be used, which is said and removed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    payload = memoryview(data)[:-DIGEST_BYTES]
    state, why = None, "its checksum is wrong"
    if hashlib.sha256(payload).digest() == data[-DIGEST_BYTES:]:
        try:
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            why = None if state["format"] == FORMAT else "it is of another version of delta-transfer"
        except Exception as error:  # nothing that follows a right checksum is to be trusted for that
            why = f"{type(error).__name__}: {error}".splitlines()[0]
    if why is not None:
        log.info(f"{path} cannot be used ({why}): the run starts again")
        path.unlink(missing_ok=True)
        return None
    if state["made_with"] != made_with(device):
        log.info(
            f"{path} was made with {state['made_with']}: the run goes on, but not bit for bit as it would have there"
        )
    return state


def made_with(device: torch.device) -> str:
    """What decides in which order numbers are added up."""
    return f"torch {torch.__version__} on {device_name(device)}, {distributed.processes()} processes"


class _Hashed:
    """A file to write to that also computes the checksum of what passes."""

    def __init__(self, file: IO[bytes]):
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()

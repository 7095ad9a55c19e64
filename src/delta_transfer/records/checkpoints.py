"""last.pt: the checkpoint with everything that a run needs to resume, and a checksum.

It holds no states of random number generators: the loop derives all randomness from (seed, iteration).
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from ..common.console import log

FORMAT = 5
DIGEST_BYTES = hashlib.sha256().digest_size


def write_checkpoint(file: IO[bytes], state: dict[str, Any], made_with: str) -> None:
    """Writes torch.save's file and its sha256.

    state: tensors, numbers, texts and containers of them. made_with: what decides the order in which numbers are added.
    """
    hashed = _Hashed(file)
    try:
        torch.save({"format": FORMAT, "made_with": made_with} | state, cast(BinaryIO, hashed))
    except RuntimeError:  # torch's error while writing
        if hashed.error is not None:
            raise hashed.error from None
        raise
    file.write(hashed.digest.digest())


def read_checkpoint(
    path: Path, made_with: str, fits: Callable[[dict[str, Any]], bool] = lambda state: True
) -> dict[str, Any] | None:
    """The state in `path`, on the CPU; None if there is none. An unusable file is named and removed.

    fits: whether a state holds what the run needs to resume.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    payload = memoryview(data)[:-DIGEST_BYTES]
    state: dict[str, Any] = {}
    why: str | None = "its checksum is wrong"
    if hashlib.sha256(payload).digest() == data[-DIGEST_BYTES:]:
        try:
            state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or state.get("format") != FORMAT:
                why = "another version of delta-transfer wrote it"
            else:
                why = None if isinstance(state.get("made_with"), str) and fits(state) else "it is not complete"
        except Exception as error:  # a correct checksum does not make the content trustworthy
            why = f"{type(error).__name__}: {error}".splitlines()[0]
    if why is not None:
        log.info(f"{path} cannot be used ({why}): the run starts again")
        path.unlink(missing_ok=True)
        return None
    if state["made_with"] != made_with:
        log.info(
            f"{path} was made with {state['made_with']}: the run resumes, but its numbers may differ in the last bits"
        )
    return state


class _Hashed:
    """A file to write to, which also computes the checksum of the data."""

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

"""Whether the files of a finished run still belong together.

summary.json holds `digests` of the record itself, of its predictions or the similarities of its pairs, and of the
trained weights. They show that a file was changed or comes from another run. They are not a signature: who changes a
record on purpose can compute its digest, too. Nothing here imports torch.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .metrics import METRICS

if TYPE_CHECKING:
    import numpy as np

DIGESTS = "digests"
WHAT_TO_DO = "put the original back, or remove the run's folder and make the run again"


def with_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the digest of its own content."""
    return {**record, DIGESTS: {**record.get(DIGESTS, {}), "record": _digest(record)}}


def problem_of(record: Mapping[str, Any]) -> str | None:
    """Why the content of a record cannot be trusted; None if there is no reason.

    A record without digests, from before they were written, is accepted.
    """
    digests = record.get(DIGESTS)
    if digests is not None and (not isinstance(digests, dict) or digests.get("record") != _digest(record)):
        return f"it was changed after the run ended: {WHAT_TO_DO}"
    further = [key for key in record if key.startswith(("kept_", "also_")) and not key.endswith("_loss")]
    for key in (*(key for key, metric in METRICS.items() if metric.percent), *further):
        value = record.get(key)
        if isinstance(value, int | float) and not 0 <= value <= 100:
            return f"its {key} is {value}, which is not a percentage: {WHAT_TO_DO}"
    return None


def digest_of(record: Mapping[str, Any], what: str) -> str | None:
    """The recorded digest of `what` (predictions, pairs, weights); None if the record has none."""
    digests = record.get(DIGESTS)
    found = digests.get(what) if isinstance(digests, dict) else None
    return found if isinstance(found, str) else None


def array_digest(arrays: "Mapping[str, np.ndarray]") -> str:
    """sha256 over names, dtypes, shapes and values, as records/checked.py computes it for tensors."""
    kinds = "".join(f"{name} torch.{arrays[name].dtype} {arrays[name].shape}\n" for name in sorted(arrays))
    values = hashlib.sha256()
    for name in sorted(arrays):
        values.update(name.encode())
        values.update(arrays[name].tobytes())
    return hashlib.sha256((kinds + values.hexdigest()).encode()).hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    digests = record.get(DIGESTS)
    others = {key: value for key, value in digests.items() if key != "record"} if isinstance(digests, dict) else {}
    content = {**record, DIGESTS: others}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

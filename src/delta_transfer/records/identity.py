"""A run's identity: everything that decides its result, and the name made from it."""

import hashlib
import json
from dataclasses import fields
from typing import Any

from ..common.options import Options, default_of


def identity_of(options: Options) -> dict[str, Any]:
    """The options that differ from their defaults, and the version of each group that is not the first.

    Equal identities stand for equal results. A key or a group that is added later, with a default that means what its
    absence meant, changes no identity. Whoever changes a default raises the version of its group.
    """
    identity: dict[str, Any] = {} if options.version == 1 else {"version": options.version}
    for entry in fields(options):  # type: ignore[arg-type]
        if not entry.metadata.get("identity", True):
            continue
        value = _plain(getattr(options, entry.name))
        # The name distinguishes groups with the same keys. A group at its defaults may still have a version.
        if entry.name == "name" or value != _plain(default_of(entry)) or _versioned(value):
            identity[entry.name] = value
    return identity


def _plain(value: Any) -> Any:
    if isinstance(value, Options):
        return identity_of(value)
    if isinstance(value, dict):  # the terms of a sum
        return {name: _plain(one) for name, one in value.items()}
    return value


def _versioned(value: Any) -> bool:
    return isinstance(value, dict) and ("version" in value or any(map(_versioned, value.values())))


def run_identity(
    config: Options, dataset_fingerprint: str, weights_fingerprint: str, sources: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The identity of a run's configuration, with fingerprints in the place of paths.

    sources: the identities of the networks that `source=` names.
    """
    identity = identity_of(config)
    identity["dataset"]["root"] = dataset_fingerprint
    identity["backbone"]["weights"] = weights_fingerprint
    identity.pop("source", None)
    return identity if sources is None else identity | {"source": sources}


def run_id(dataset: str, backbone: str, method: str, seed: int, identity: dict[str, Any]) -> str:
    """The name of a run: its choices, its seed, and eight digits of its identity's hash."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{dataset}-{backbone}-{method}-s{seed}-{digest}"

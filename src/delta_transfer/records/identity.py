"""A run's identity: everything that decides its result, and the name made from it."""

import dataclasses
import hashlib
import json
from dataclasses import fields
from typing import Any

from ..common.options import Options


def identity_of(options: Options) -> dict[str, Any]:
    """The options that differ from their defaults, with the version of each group.

    Equal identities stand for equal results. A key that is added later, with a default that means what its absence
    meant, changes no identity. Whoever changes a default raises the version of its group.
    """
    identity: dict[str, Any] = {"version": options.version}
    for entry in fields(options):  # type: ignore[arg-type]
        value = getattr(options, entry.name)
        if not entry.metadata.get("identity", True):
            continue
        if isinstance(value, Options):
            identity[entry.name] = identity_of(value)
        elif isinstance(value, dict):  # the terms of a sum
            identity[entry.name] = {name: identity_of(term) for name, term in value.items()}
        elif entry.name == "name" or value != _default(entry):
            identity[entry.name] = value
    return identity


def _default(entry: "dataclasses.Field[Any]") -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


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

"""A run's identity: all that decides its result, and the name made of it."""

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # delta-report reads records without Hydra
    from ..config import RunConfig

# Where a run is made and what it logs, not what it is: these keys make no other run and no other row of a table.
NOT_IDENTITY = {
    *("device", "data_dir", "results_dir", "cache_dir", "logging", "dry_run", "retry_failed", "model_card"),
    *("dataset.download", "dataset.official", "dataset.train_root"),  # whose images are part of the fingerprint
    *("schedule.log_every", "schedule.eval_every", "schedule.checkpoint_seconds"),
    "reg.attention.forward_images",
}


# Keys that came after the first records, with what a run meant that has none of them. Where they say just that, they
# are no part of a run's name, which is the one that it had before.
CAME_LATER = {
    "schedule.accumulate": 1,
    "schedule.decay": "step",
    "schedule.decay_also_at": [],
    "schedule.pad": 0,
    "source": None,
}


def run_identity(
    config: "RunConfig", dataset_fingerprint: str, weights_fingerprint: str, sources: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The resolved configuration with paths replaced by what lies there; `sources`: that of `config.source`."""
    identity = asdict(config)
    if identity["task"] == "classification":  # which came later, too
        del identity["task"], identity["arcface"]
    for key in NOT_IDENTITY | CAME_LATER.keys():
        *groups, name = key.split(".")
        part = identity
        for group in groups:
            part = part.get(group) or {}
        if key not in CAME_LATER or part[name] == CAME_LATER[key]:
            part.pop(name, None)
    for term in identity["reg"].get("terms", {}).values():  # of a sum, where the same keys are one level deeper
        (term.get("attention") or {}).pop("forward_images", None)
    if sources is not None:
        identity["source"] = sources
    identity["dataset"]["root"] = dataset_fingerprint
    identity["backbone"]["weights"] = weights_fingerprint
    return identity


def run_id(config: "RunConfig", identity: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.dataset.name}-{config.backbone.name}-{config.reg.name}-s{config.seed}-{digest}"

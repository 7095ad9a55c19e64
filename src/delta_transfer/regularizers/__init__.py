"""Methods by name. A new one: a file here, a YAML in conf/reg/, and a line below."""

from dataclasses import fields

from ..config import choose
from .base import Regularizer
from .delta import DELTA, DELTAWithoutAttention
from .l2 import L2, L2FE
from .l2_sp import L2SP

REGULARIZERS: dict[str, type[Regularizer]] = {
    "l2": L2,
    "l2_fe": L2FE,
    "l2_sp": L2SP,
    "delta_noatt": DELTAWithoutAttention,
    "delta": DELTA,
}

__all__ = ["DELTA", "L2", "L2FE", "L2SP", "REGULARIZERS", "DELTAWithoutAttention", "Regularizer", "build_regularizer"]


def build_regularizer(config) -> Regularizer:
    """The method that a checked `reg` configuration (config.RegConfig or the like) describes."""
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "name"}
    return choose(REGULARIZERS, "reg.name", config.name)(**options)

"""Methods by name. A new one: a file here, a YAML in conf/reg/, and a line below."""

from dataclasses import fields
from inspect import signature

from ..common.errors import UserError
from ..common.options import choose
from ..config import RegConfig, SumConfig, about_term
from .afa import AFA, AFAChannel, AFASpatial
from .attention_transfer import AT
from .base import Regularizer
from .bi_tuning import BiTuning
from .bss import BSS
from .co_tuning import CoTuning
from .delta import DELTA, DELTAWithoutAttention
from .l2 import L2, L2FE, Scratch
from .l2_sp import L2SP
from .l2_sp_fisher import L2SPFisher
from .l2t_ww import L2TWW
from .lp_ft import LPFT
from .lwf import LwF
from .matching import FM
from .rifle import RIFLE
from .stochnorm import StochNorm
from .sum import Sum

REGULARIZERS: dict[str, type[Regularizer]] = {
    "l2": L2,
    "l2_fe": L2FE,
    "l2_sp": L2SP,
    "delta_noatt": DELTAWithoutAttention,
    "delta": DELTA,
    "afa": AFA,
    "afa_spatial": AFASpatial,
    "afa_channel": AFAChannel,
    "l2t_ww": L2TWW,
    "l2t_w": L2TWW,
    "scratch": Scratch,
    "lwf": LwF,
    "at": AT,
    "fm": FM,
    "bss": BSS,
    "l2_sp_fisher": L2SPFisher,
    "co_tuning": CoTuning,
    "lp_ft": LPFT,
    "rifle": RIFLE,
    "stochnorm": StochNorm,
    "bi_tuning": BiTuning,
    "sum": Sum,
    "lwf_at": Sum,
    "lwf_fm": Sum,
}

__all__ = [
    *("AFA", "AFAChannel", "AFASpatial", "DELTA", "DELTAWithoutAttention", "L2", "L2FE", "L2SP", "L2TWW"),
    *("AT", "FM", "LwF", "Scratch", "Sum"),
    *("BSS", "BiTuning", "CoTuning", "L2SPFisher", "LPFT", "RIFLE", "StochNorm"),
    *("REGULARIZERS", "Regularizer", "build_regularizer"),
]


def build_regularizer(config: RegConfig) -> Regularizer:
    """The method that a checked `reg` configuration (config.RegConfig or the like) describes."""
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "name"}
    if isinstance(config, SumConfig):  # whose name says what it is a sum of
        built = {}
        for name, term in config.terms.items():
            with about_term(name):
                built[name] = build_regularizer(term)
        return Sum(**options | {"terms": built})
    method = choose(REGULARIZERS, "reg.name", config.name)
    try:
        signature(method).bind(**options)
    except TypeError as error:
        raise UserError(
            f"reg.name={config.name} does not take the options of this file of conf/reg ({error}): choose a method by "
            f"reg={config.name}, or set the schema of yours."
        ) from None
    return method(**options)

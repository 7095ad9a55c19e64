"""Transfer learning with DELTA and its relatives: a run is one dataset, backbone, reg and schedule.

In a loop of your own, on any torch.nn.Module (examples/ of the repository):

    from delta_transfer import DELTA, tapped

    source = tapped(model, head="fc", taps=["layer4.1.conv2"]).freeze()
    target = source.with_new_head(num_classes=20, seed=0).requires_grad_(True).train()
    delta = DELTA(alpha=0.01)
    delta.fit(source, batches, num_classes=20)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import AttentionConfig
    from .methods import (
        AFA,
        AT,
        BSS,
        DELTA,
        FM,
        L2SP,
        L2TWW,
        LPFT,
        RIFLE,
        AFAChannel,
        AFASpatial,
        BiTuning,
        CoTuning,
        DELTAWithoutAttention,
        L2SPFisher,
        LwF,
        Regularizer,
        StochNorm,
    )
    from .methods.attention import ChannelImportance, channel_attention
    from .models import HookedNetwork, Network, call, tapped

__version__ = version("delta-transfer")

# fmt: off
__all__ = [
    "AFA", "AFAChannel", "AFASpatial", "AT", "AttentionConfig", "BSS", "BiTuning", "ChannelImportance", "CoTuning",
    "DELTA", "DELTAWithoutAttention", "FM", "HookedNetwork", "L2SP", "L2SPFisher", "L2TWW", "LPFT", "LwF", "Network",
    "RIFLE", "Regularizer", "StochNorm", "call", "channel_attention", "tapped",
]
# fmt: on

# Imported when they are asked for: the commands begin without torch, which takes seconds to import.
_HOMES = {
    ".config": ("AttentionConfig",),
    ".models": ("HookedNetwork", "Network", "call", "tapped"),
    ".methods": (
        *("AFA", "AFAChannel", "AFASpatial", "DELTA", "DELTAWithoutAttention", "L2SP", "Regularizer"),
        *("AT", "BSS", "BiTuning", "CoTuning", "FM", "L2SPFisher", "L2TWW", "LPFT", "LwF", "RIFLE", "StochNorm"),
    ),
    ".methods.attention": ("ChannelImportance", "channel_attention"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

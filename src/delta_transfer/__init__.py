"""Transfer learning with DELTA and its relatives: a run is one dataset, backbone, reg and schedule.

On a folder of images, as delta-run does:

    from delta_transfer import fine_tune

    tuned = fine_tune("photos", backbone="resnet50", method="delta")
    print(tuned.record["test_top1"], tuned.network)

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

from .common.cores import choose_anew_elsewhere

if TYPE_CHECKING:  # For editors and type checkers. At run time the methods' names follow from their registry.
    from .experiment.fine_tune import FineTuned as FineTuned
    from .experiment.fine_tune import fine_tune as fine_tune
    from .methods.afa import AFA as AFA
    from .methods.afa import AFAChannel as AFAChannel
    from .methods.afa import AFASpatial as AFASpatial
    from .methods.attention import AttentionConfig as AttentionConfig
    from .methods.attention import ChannelImportance as ChannelImportance
    from .methods.attention import channel_attention as channel_attention
    from .methods.attention_transfer import AT as AT
    from .methods.base import Regularizer as Regularizer
    from .methods.bi_tuning import BiTuning as BiTuning
    from .methods.bss import BSS as BSS
    from .methods.co_tuning import CoTuning as CoTuning
    from .methods.delta import DELTA as DELTA
    from .methods.delta import DELTAWithoutAttention as DELTAWithoutAttention
    from .methods.l2_sp import L2SP as L2SP
    from .methods.l2_sp_fisher import L2SPFisher as L2SPFisher
    from .methods.l2t_ww import L2TWW as L2TWW
    from .methods.ldifs import LDIFS as LDIFS
    from .methods.lora import LoRA as LoRA
    from .methods.lp_ft import LPFT as LPFT
    from .methods.lwf import LwF as LwF
    from .methods.matching import FM as FM
    from .methods.partial_tuning import BitFit as BitFit
    from .methods.partial_tuning import LNTune as LNTune
    from .methods.rifle import RIFLE as RIFLE
    from .methods.spd import SPD as SPD
    from .methods.stochnorm import StochNorm as StochNorm
    from .models import HookedNetwork as HookedNetwork
    from .models import Network as Network
    from .models import call as call
    from .models import tapped as tapped

choose_anew_elsewhere()  # here, since a worker that unpickles its job may import torch before it imports cli/
__version__ = version("delta-transfer")

# Beside the methods. All names are imported when they are asked for: a command begins without torch, which takes
# seconds to import.
_HOMES = {
    "AttentionConfig": ".methods.attention",
    "ChannelImportance": ".methods.attention",
    "FineTuned": ".experiment.fine_tune",
    "HookedNetwork": ".models",
    "Network": ".models",
    "Regularizer": ".methods",
    "call": ".models",
    "channel_attention": ".methods.attention",
    "fine_tune": ".experiment.fine_tune",
    "tapped": ".models",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        methods = import_module(".methods", __name__).METHODS.entries.values()
        return sorted({*_HOMES, *(entry.thing.__name__ for entry in methods)})
    if name in _HOMES or name[0].isupper():  # only classes begin with a capital
        return getattr(import_module(_HOMES.get(name, ".methods"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})

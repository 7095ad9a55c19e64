"""Networks: building them, their weights, and their tapped feature maps."""

from .arcface import ArcFaceConfig, ArcFaceLoss, CosineHead
from .frozen import FrozenSources, forward_in_chunks, frozen_backbone, frozen_maps
from .hooked import HookedNetwork, tapped
from .taps import Network, call

# fmt: off
__all__ = [
    "ArcFaceConfig", "ArcFaceLoss", "CosineHead", "FrozenSources", "HookedNetwork", "Network",
    "call", "frozen_backbone", "frozen_maps", "forward_in_chunks", "tapped",
]
# fmt: on

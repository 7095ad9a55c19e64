"""Networks: building them, their weights, and their tapped feature maps."""

from .arcface import ArcFaceLoss, CosineHead
from .frozen import FrozenSources, frozen_backbone, frozen_maps, in_parts
from .hooked import HookedNetwork, tapped
from .taps import Network, call

# fmt: off
__all__ = [
    "ArcFaceLoss", "CosineHead", "FrozenSources", "HookedNetwork", "Network",
    "call", "frozen_backbone", "frozen_maps", "in_parts", "tapped",
]
# fmt: on

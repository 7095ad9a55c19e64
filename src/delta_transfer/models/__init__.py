"""Networks: building them, their weights, and their tapped feature maps."""

from .arcface import ArcFaceLoss, CosineHead
from .frozen import FrozenSources, frozen_backbone, frozen_maps, in_parts
from .taps import Network

__all__ = ["ArcFaceLoss", "CosineHead", "FrozenSources", "Network", "frozen_backbone", "frozen_maps", "in_parts"]

"""Networks: building them, their weights, and their tapped feature maps."""

from .taps import Network

__all__ = ["Network"]

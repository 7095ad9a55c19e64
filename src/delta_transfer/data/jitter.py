"""Random changes of the colours of training images, as TensorFlow's image operations make them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Jitter:
    """brightness: the largest shift, in 0..1. contrast, saturation: c for a factor between 1 - c and 1 + c."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def apply(self, pixels: Tensor, random: Tensor) -> Tensor:
        """Images (B, 3, H, W) in 0..1 with other colours, not clipped. random: (B, 3) of [0, 1).

        The order is: the shift; saturation in HSV, where s becomes min(f s, 1); contrast around the mean of each colour
        channel of the image.
        """
        shift, saturate, contrast = (2 * random[:, :, None, None, None] - 1).unbind(dim=1)
        pixels = pixels + self.brightness * shift
        if self.saturation:
            value, least = pixels.amax(dim=1, keepdim=True), pixels.amin(dim=1, keepdim=True)
            most = value / (value - least).clamp(min=1e-12)  # 1 / s
            factor = (1 + self.saturation * saturate).minimum(most.clamp(min=0))
            pixels = value - (value - pixels) * factor
        mean = pixels.mean(dim=(2, 3), keepdim=True)
        return mean + (pixels - mean) * (1 + self.contrast * contrast)

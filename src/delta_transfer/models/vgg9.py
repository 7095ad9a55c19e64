"""VGG-9 with BatchNorm for 32-pixel images, as the authors of L2T-ww train it, without the parameters nothing uses."""

import torch.nn.functional as F
from torch import Tensor, nn

from .small_resnet import initialise


class VGG9(nn.Module):
    """images (B, 3, 32, 32) -> logits (B, num_classes). Groups of 3x3 convolutions with a max-pool behind each.

    64 | 128 | 256, 256 | 512, 512 | 512, 512 channels at 32, 16, 8, 4, 2 pixels, global average, one linear layer;
    with another width than 64 as many times more or fewer. The output of a group is its last ReLU's.
    """

    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        self.group0 = _group(3, width)
        self.group1 = _group(width, 2 * width)
        self.group2 = _group(2 * width, 4 * width, 4 * width)
        self.group3 = _group(4 * width, 8 * width, 8 * width)
        self.group4 = _group(8 * width, 8 * width, 8 * width)
        self.fc = self.make_head(8 * width, num_classes)
        initialise(self)

    @staticmethod
    def make_head(features: int, num_classes: int) -> nn.Linear:
        """The classification layer, normal with std 0.01; also one for other classes (`Network.with_new_head`)."""
        head = nn.Linear(features, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for group in (self.group0, self.group1, self.group2, self.group3, self.group4):
            x = F.max_pool2d(group(x), 2)
        return self.fc(x.mean(dim=(2, 3)))


def _group(*channels: int) -> nn.Sequential:
    layers = []
    for before, after in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)

"""ResNet-32 for 32-pixel images, as the authors of L2T-ww train it: 3 stages of 5 of torchvision's BasicBlock.

It differs from that of He et al.: the first convolution has a bias, and shortcuts between stages are 1x1 convolutions
with BatchNorm. (Their class also has parameters that nothing uses; they are left out.)
"""

from torch import Tensor, nn

from .small_resnet import initialise, stage


class ResNet32(nn.Module):
    """images (B, 3, 32, 32) -> logits (B, num_classes). Stages of 16, 32, 64 channels at 32, 16, 8 pixels."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(16, 16, 5, stride=1)
        self.layer2 = stage(16, 32, 5, stride=2)
        self.layer3 = stage(32, 64, 5, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))

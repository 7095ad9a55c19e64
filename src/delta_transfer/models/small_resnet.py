"""A small ResNet for 32-pixel images: a strided convolution, then 3 stages of torchvision's BasicBlock."""

from torch import Tensor, nn


class SmallResNet(nn.Module):
    """images (B, 3, 32, 32) -> logits (B, num_classes). Stages of 32, 64, 128 channels at 16, 8, 4 pixels."""

    def __init__(self, num_classes: int, width: int = 32, blocks: int = 2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(width, width, blocks, stride=1)
        self.layer2 = stage(width, 2 * width, blocks, stride=2)
        self.layer3 = stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def initialise(model: nn.Module) -> None:
    """Convolutions: normal with variance 2/fan-out, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock  # slow to import

    shortcut = None
    if stride != 1 or channels_in != channels_out:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(channels_out),
        )
    first = BasicBlock(channels_in, channels_out, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels_out, channels_out) for _ in range(blocks - 1)))

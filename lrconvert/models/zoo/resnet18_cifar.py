"""ResNet-18 for 32×32 images, as Pufferfish and Cuttlefish train it on CIFAR-10, CIFAR-100 and SVHN.

Source: He et al. 2016, https://arxiv.org/abs/1512.03385, with the stem of Pufferfish's table 12: a 3×3 convolution of
stride 1 and no max pooling. Parameters with 10 classes: 11,173,962, or 11,173,834 without the stem's BatchNorm.
"""

from torch import Tensor, nn

INPUT_SHAPE = (3, 32, 32)


class ResNet18Cifar(nn.Module):
    """(batch, in_channels, height, width) to (batch, num_classes).

    Args:
        num_classes: outputs.
        width: channels of the stem; the four stages have 1, 2, 4 and 8 times as many.
        in_channels: colours of an image.
        stem_stride: of the first convolution; 2 makes the network four times as cheap.
        stem_norm: whether a BatchNorm follows the first convolution. The paper's printed sizes are of both kinds.
    """

    def __init__(
        self, num_classes: int = 10, width: int = 64, in_channels: int = 3, stem_stride: int = 1, stem_norm: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width) if stem_norm else nn.Identity()
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut: (batch, channels, h, w) to (batch, out, h/stride, w/stride).

    The shortcut is a 1×1 convolution with a BatchNorm where the shape changes, and the identity elsewhere.
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Both paths added."""
        out: Tensor = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return out.relu()


def _stage(channels: int, out: int, stride: int) -> nn.Sequential:
    """Two blocks, of which the first changes the shape."""
    return nn.Sequential(Block(channels, out, stride), Block(out, out, 1))

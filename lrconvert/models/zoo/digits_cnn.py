"""The network of `lrconvert demo`: four convolutions and two linear layers, for the 8×8 digits of scikit-learn."""

from torch import Tensor, nn

INPUT_SHAPE = (1, 8, 8)


class DigitsCNN(nn.Module):
    """(batch, 1, 8, 8) to (batch, num_classes).

    Args:
        width: channels of the first convolution; the others have two and four times as many.
        num_classes: outputs.
    """

    def __init__(self, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.conv4 = nn.Conv2d(4 * width, 4 * width, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * width)
        self.hidden = nn.Linear(4 * width, 2 * width)
        self.classifier = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        x = self.bn4(self.conv4(x)).relu().mean((2, 3))
        out: Tensor = self.classifier(self.hidden(x).relu())
        return out

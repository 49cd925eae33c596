"""VGG-19 with BatchNorm for 32×32 images, as Pufferfish and Cuttlefish train it on CIFAR-10.

Source: Simonyan & Zisserman 2015, https://arxiv.org/abs/1409.1556, configuration E, with the head of Pufferfish's
table 10 (three linear layers of 512: 20,560,330 parameters with 10 classes) or table 17 (one: 20,035,018). In both
counts the convolutions have no bias: the BatchNorm after each has one.
"""

from torch import Tensor, nn

INPUT_SHAPE = (3, 32, 32)

# (convolutions, multiple of the width) of the five stages; each ends in a 2×2 max pooling, which leaves 1×1 of 32×32.
_STAGES = ((2, 1), (2, 2), (4, 4), (4, 8), (4, 8))


class VGG19Cifar(nn.Module):
    """(batch, 3, 32, 32) to (batch, num_classes).

    The convolutions are `features.conv1` to `features.conv16`, the linear layers `classifier.fc17` and so on.

    Args:
        num_classes: outputs.
        num_linear: linear layers of the head, 3 in Pufferfish's main experiments and 1 in its comparison with pruning.
        width: channels of the first stage.
        dropout: probability of dropout before each linear layer.

    Raises:
        ValueError: `num_linear` is less than 1.
    """

    def __init__(self, num_classes: int = 10, num_linear: int = 3, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        if num_linear < 1:
            raise ValueError(f"num_linear must be 1 or more, not {num_linear}")
        self.features = nn.Sequential()
        channels, number = 3, 0
        for stage, (num_convolutions, multiple) in enumerate(_STAGES, start=1):
            for _ in range(num_convolutions):
                number += 1
                out = multiple * width
                self.features.add_module(f"conv{number}", nn.Conv2d(channels, out, 3, padding=1, bias=False))
                self.features.add_module(f"bn{number}", nn.BatchNorm2d(out))
                self.features.add_module(f"relu{number}", nn.ReLU())
                channels = out
            self.features.add_module(f"pool{stage}", nn.MaxPool2d(2))
        self.classifier = nn.Sequential()
        for hidden in range(number + 1, number + num_linear):
            self.classifier.add_module(f"dropout{hidden}", nn.Dropout(dropout))
            self.classifier.add_module(f"fc{hidden}", nn.Linear(channels, channels))
            self.classifier.add_module(f"relu{hidden}", nn.ReLU())
        last = number + num_linear
        self.classifier.add_module(f"dropout{last}", nn.Dropout(dropout))
        self.classifier.add_module(f"fc{last}", nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        out: Tensor = self.classifier(self.features(x).flatten(1))
        return out

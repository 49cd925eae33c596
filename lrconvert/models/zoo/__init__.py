"""lrconvert's own networks: "zoo/NAME", one file each; the papers' where no library has them exactly."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lrconvert.errors import UnknownNameError
from lrconvert.inputs import one_input
from lrconvert.models.architecture import Architecture
from lrconvert.models.zoo import digits_cnn, lstm_lm, resnet18_cifar, transformer, vgg19_bn_cifar

# Name to class and input shape; None for networks that read tokens, which a random image cannot stand for.
ZOO: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...] | None]] = {
    "digits_cnn": (digits_cnn.DigitsCNN, digits_cnn.INPUT_SHAPE),
    "lstm_lm": (lstm_lm.LSTMLanguageModel, None),
    "resnet18_cifar": (resnet18_cifar.ResNet18Cifar, resnet18_cifar.INPUT_SHAPE),
    "transformer": (transformer.Transformer, None),
    "vgg19_bn_cifar": (vgg19_bn_cifar.VGG19Cifar, vgg19_bn_cifar.INPUT_SHAPE),
}


def architecture(name: str, args: Mapping[str, Any]) -> Architecture:
    """The network `name` of the zoo.

    Raises:
        UnknownNameError: the zoo has no such network.
    """
    if name not in ZOO:
        raise UnknownNameError("zoo model", name, ZOO)
    factory, input_shape = ZOO[name]
    return Architecture(f"zoo/{name}", dict(args), factory, one_input(input_shape))

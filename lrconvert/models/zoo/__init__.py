"""lrconvert's own networks: "zoo/NAME", one file each; the papers' where no library has them exactly."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lrconvert.errors import UnknownNameError
from lrconvert.inputs import Input, Inputs
from lrconvert.models.architecture import Architecture
from lrconvert.models.zoo import digits_cnn, lstm_lm, resnet18_cifar, transformer, vgg19_bn_cifar

# Name to class and what it is called with; indices are below the default size of the vocabulary.
ZOO: dict[str, tuple[Callable[..., nn.Module], Inputs]] = {
    "digits_cnn": (digits_cnn.DigitsCNN, (Input(digits_cnn.INPUT_SHAPE),)),
    "lstm_lm": (
        lstm_lm.LSTMLanguageModel,
        (Input((35,), kind="index", high=33_278, batch_dim=1, length="steps"),),
    ),
    "resnet18_cifar": (resnet18_cifar.ResNet18Cifar, (Input(resnet18_cifar.INPUT_SHAPE),)),
    "transformer": (
        transformer.Transformer,
        tuple(Input((32,), kind="index", high=9521, length=f"{side}_tokens") for side in ("source", "target")),
    ),
    "vgg19_bn_cifar": (vgg19_bn_cifar.VGG19Cifar, (Input(vgg19_bn_cifar.INPUT_SHAPE),)),
}


def architecture(name: str, args: Mapping[str, Any]) -> Architecture:
    """The network `name` of the zoo.

    Raises:
        UnknownNameError: the zoo has no such network.
    """
    if name not in ZOO:
        raise UnknownNameError("zoo model", name, ZOO)
    factory, inputs = ZOO[name]
    vocabulary = args.get("vocab_size")
    if vocabulary is not None:
        inputs = tuple(replace(each, high=vocabulary) for each in inputs)
    return Architecture(f"zoo/{name}", dict(args), factory, inputs)

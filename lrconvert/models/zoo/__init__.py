"""lrconvert's own networks: "zoo/NAME", one file each."""

from collections.abc import Mapping
from typing import Any

from lrconvert.errors import UnknownNameError
from lrconvert.models.architecture import Architecture
from lrconvert.models.zoo import digits_cnn

ZOO = {"digits_cnn": (digits_cnn.DigitsCNN, digits_cnn.INPUT_SHAPE)}


def architecture(name: str, args: Mapping[str, Any]) -> Architecture:
    """The network `name` of the zoo.

    Raises:
        UnknownNameError: the zoo has no such network.
    """
    if name not in ZOO:
        raise UnknownNameError("zoo model", name, ZOO)
    factory, input_shape = ZOO[name]
    return Architecture(f"zoo/{name}", dict(args), factory, input_shape)

"""Models of torchvision: "torchvision/resnet50"."""

from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any

from lrconvert.errors import UnknownNameError, UsageError
from lrconvert.inputs import one_input
from lrconvert.models.architecture import Architecture


def architecture(name: str, args: Mapping[str, Any]) -> Architecture:
    """The torchvision model `name`, without pretrained weights.

    Raises:
        UnknownNameError: torchvision has no such model.
    """
    import torchvision

    known = torchvision.models.list_models()
    if name not in known:
        raise UnknownNameError("torchvision model", name, known)
    if any(argument.startswith("weights") for argument in args):
        raise UsageError("torchvision's weights are not downloaded here: the checkpoint brings them")
    # init_weights: GoogLeNet and Inception warn when it is not given; the weights are thrown away here anyway.
    fixed: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if "weights_backbone" in signature(torchvision.models.get_model_builder(name)).parameters:
        fixed["weights_backbone"] = None
    factory = partial(torchvision.models.get_model, name, weights=None, **fixed)
    return Architecture(f"torchvision/{name}", dict(args), factory, one_input(_input_shape(name)))


def _input_shape(name: str) -> tuple[int, ...] | None:
    """(3, size, size) that the model's default weights were evaluated at, for image classifiers."""
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        return None
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size = int(transforms.crop_size[0])
    return (3, size, size)

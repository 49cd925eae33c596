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
    fixed: dict[str, Any] = {"init_weights": False} if name.endswith(("googlenet", "inception_v3")) else {}
    if "weights_backbone" in signature(torchvision.models.get_model_builder(name)).parameters:
        fixed["weights_backbone"] = None
    factory = partial(torchvision.models.get_model, name, weights=None, **fixed)
    return Architecture(f"torchvision/{name}", dict(args), factory, one_input(_input_shape(name, args)))


# Frames of a clip, as torchvision counts the operations of its video models.
_FRAMES = 16


def _input_shape(name: str, args: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of an image or a clip as the model's default weights are evaluated on, as far as `args` do not change it.

    None for detection, which takes lists of images, and optical flow, which takes two.
    """
    from torchvision import models

    def is_among(module: Any) -> bool:
        return name in models.list_models(module=module)

    if name.startswith("vit_"):  # made for images of another size where weights are given
        size = int(args.get("image_size", 224))
        return (3, size, size)
    if is_among(models) or is_among(models.quantization):
        size = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
        return (3, size, size)
    if is_among(models.segmentation):
        size = models.get_model_weights(name).DEFAULT.transforms().resize_size[0]
        return (3, size, size)
    if is_among(models.video):
        return (3, _FRAMES, *models.get_model_weights(name).DEFAULT.transforms().crop_size)
    return None

"""An architecture by name: how to build it, and what its input looks like."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrconvert.errors import ModelError
from lrconvert.inputs import Inputs


@dataclass(frozen=True)
class Architecture:
    """Something that builds a dense model without weights.

    Attributes:
        name: as the user wrote it ("torchvision/resnet50"); stored in headers.
        args: keyword arguments of the factory.
        factory: builds the model on the current default device.
        inputs: what the model is called with, where the source knows it.
    """

    name: str
    args: Mapping[str, Any]
    factory: Callable[..., nn.Module]
    inputs: Inputs | None = None

    def build(self, device: str = "meta") -> nn.Module:
        """The model on `device`, with whatever weights its constructor gives it; on "meta" no memory is used.

        Raises:
            ModelError: the constructor fails.
        """
        try:
            with torch.device(device):
                model = self.factory(**self.args)
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in self.args.items())
            raise ModelError(f"{self.name}({given}) cannot be built: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{self.name} returned an object of type {type(model).__name__}, not an nn.Module")
        return model

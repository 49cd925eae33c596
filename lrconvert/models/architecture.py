"""An architecture by name: how to build it, and what its input looks like."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lrconvert.errors import ModelError
from lrconvert.inputs import Inputs
from lrconvert.tensors import TensorRef


class Converted(NamedTuple):
    """A tensor as a model has it, and the key in the checkpoint of what it is made of, the first of several."""

    ref: TensorRef
    source: str


@dataclass(frozen=True)
class Architecture:
    """Something that builds a dense model without weights.

    Attributes:
        name: as the user wrote it ("torchvision/resnet50"); stored in headers.
        args: keyword arguments of the factory.
        factory: builds the model on the current default device.
        inputs: what the model is called with, where the source knows it.
        renamed: from the model and the keys of a checkpoint, the keys that the model has for them; None for tensors
            that are merged with others on loading. Only of sources that do such things.
        converted: from the model and the tensors of a dense checkpoint, what the source makes of them on loading, under
            the model's keys; None where they are so already. Only of sources that do such things.
        from_folder: loads a folder in the source's own way, for checkpoints that do not have the model's keys.
        as_graph: while this context lasts, the model's forward is one that can be exported.
    """

    name: str
    args: Mapping[str, Any]
    factory: Callable[..., nn.Module]
    inputs: Inputs | None = None
    renamed: Callable[[nn.Module, Iterable[str]], Mapping[str, str | None]] | None = None
    converted: Callable[[nn.Module, Mapping[str, TensorRef]], Mapping[str, Converted] | None] | None = None
    from_folder: Callable[[Path], nn.Module] | None = None
    as_graph: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext

    def build(self, device: str = "meta") -> nn.Module:
        """The model on `device`, with whatever weights its constructor gives it; on "meta" no memory is used.

        Raises:
            ModelError: the constructor fails.
        """
        try:
            return self._made(device)
        except ModelError:
            if device != "meta":
                raise
        # Some constructors compute with tensors, as that of torchvision's RegNets does.
        return self.build_without_parameters().to("meta")

    def _made(self, device: str) -> nn.Module:
        try:
            with torch.device(device):
                model = self.factory(**self.args)
        except (Exception, SystemExit) as error:
            given = ", ".join(f"{key}={short(value)}" for key, value in self.args.items())
            raise ModelError(f"{self.name}({given}) cannot be built: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{self.name} returned an object of type {type(model).__name__}, not an nn.Module")
        return model

    def build_without_parameters(self) -> nn.Module:
        """The model with its buffers computed, and its parameters on the meta device where the constructor allows it.

        Some compute with their parameters, or make buffers of them: those get real ones.

        Raises:
            ModelError: the constructor fails.
        """
        with suppress(ModelError), _parameters_on_meta():
            model = self._made("cpu")
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
        return self._made("cpu")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put every parameter on the meta device as soon as a module registers it, before it is initialised."""
    register = nn.Module.register_parameter
    # One that is registered twice is tied, and stays so.
    moved: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if param not in moved:
                moved[param] = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            param = moved[param]
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

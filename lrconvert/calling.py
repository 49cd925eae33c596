"""Dense linear layers that a parent multiplies by without calling them, made to be called, so that hooks see them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lrconvert.layers.stand_in import linear_operands


@contextmanager
def calling(model: nn.Module) -> Iterator[None]:
    """While it lasts, `functional.linear(x, layer.weight, bias)` in the forward of `model` is the output of `layer(x)`.

    Only hooks see a difference. Low-rank layers are called at all times, see `lrconvert.layers.stand_in`.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and "forward" not in vars(module)]
    mode = _Calling(layers)
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(mode.enter).remove)
            stack.callback(layer.register_forward_hook(mode.leave, always_call=True).remove)
        stack.enter_context(mode)
        yield


class _Calling(TorchFunctionMode):
    """Calls the layers whose weights are multiplied by."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = layers
        self.owners: dict[int, list[nn.Linear]] = {}
        self.running: set[nn.Module] = set()

    def enter(self, layer: nn.Module, arguments: Any) -> None:
        """Before a call."""
        self.running.add(layer)

    def leave(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        """After a call."""
        self.running.discard(layer)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What `func` returns."""
        kwargs = kwargs or {}
        if func is functional.linear:
            x, weight, bias = linear_operands(*args, **kwargs)
            owners = self._owners(weight)
            # A layer that is running takes the product itself; of several that share a weight none is meant.
            if len(owners) == 1 and not self.running.intersection(owners):
                return _call(owners[0], x, lambda x: func(x, weight, bias))
        return func(*args, **kwargs)

    def _owners(self, weight: torch.Tensor) -> list[nn.Linear]:
        """The layers that have this weight."""
        if not self.owners:  # not earlier: by then the model may have been given other tensors
            for layer in self.layers:
                self.owners.setdefault(id(layer._parameters.get("weight")), []).append(layer)
        return self.owners.get(id(weight), [])


def _call(layer: nn.Module, x: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What `layer(x)` returns if it computes `forward`, this once."""
    layer.forward = forward
    try:
        return layer(x)
    finally:
        del layer.forward

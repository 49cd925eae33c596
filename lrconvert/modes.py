"""The state a model is looked at in, eval mode or more; it comes back as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lrconvert.errors import ModelError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` is in eval mode; then each of its modules gets the mode back that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def on_meta(model: nn.Module) -> Iterator[None]:
    """While it lasts, parameters and buffers of `model` have no data; what is shared stays shared.

    Not torch.func.functional_call: of a module that is reached under two names it puts back the wrong parameters.

    Raises:
        ModelError: a part of `model` is compiled by torch.jit, and keeps its data whatever happens; nothing is changed.
    """
    compiled = next(
        (name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None
    )
    if compiled is not None:
        raise ModelError(f"{compiled or 'it'} is compiled by torch.jit")
    stores = [store for module in model.modules() for store in (module._parameters, module._buffers)]
    kept = [dict(store) for store in stores]
    made: dict[int, Tensor] = {}
    try:
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = tensor.detach().to("meta")
                    store[name] = made[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for store, before in zip(stores, kept, strict=True):
            store.clear()  # of what the forward registered, too
            store.update(before)  # type: ignore[arg-type]


@contextmanager
def at_rest(
    model: nn.Module, trained: Iterable[nn.Parameter] = (), device: torch.device | None = None
) -> Iterator[torch.device]:
    """While it lasts, `model` is in eval mode on `device`, its own if None, with gradients for `trained` alone.

    Torch's fused path for encoder layers is off: hooks see nothing of it.

    Yields:
        The device. Afterwards the model is where and as it was; gradients of `trained` are gone.
    """
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    home = next((parameter.device for parameter in wanted), torch.device("cpu"))
    trained = tuple(trained)
    try:
        model.to(device or home).requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with evaluating(model), without_fast_path():
            yield device or home
    finally:
        for parameter in trained:
            parameter.grad = None
        model.to(home)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """While it lasts, torch.nn's attention and encoder layers compute what their parts would."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Unremarkable(TorchDispatchMode):
    """While it lasts, code that asks whether all numbers of a tensor without data are true hears yes; whether any, no.

    So ask models of transformers, of masks: whether every token counts, whether any is padding. Then they take the way
    that they take for whole inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What `func` returns; the number, where it asks for one that is known."""
        if func is _aten._local_scalar_dense.default and args[0] in self.known:
            return self.known[args[0]]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_meta:
            if func in (_aten.all.default, _aten.any.default):
                self.known[result] = func is _aten.all.default
            elif func is _aten.sum.default and args[0].dtype == torch.bool:
                self.known[result] = args[0].numel()
            elif func is _aten.eq.Scalar and args[0] in self.known:
                self.known[result] = self.known[args[0]] == args[1]
        return result


_aten = torch.ops.aten

"""The state a model is looked at in, eval mode or more; it comes back as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


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

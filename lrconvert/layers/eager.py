"""Whether operations just run: what a layer may do only where nobody follows it."""

import torch
from torch import Tensor, nn
from torch.fx import Proxy


def followed() -> bool:
    """Whether somebody records or transforms operations: torch.compile and export, torch.jit.trace, torch.func."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return recorded or torch._C._are_functorch_transforms_active()


def captured() -> bool:
    """Whether a graph is made that is to serve other numbers too, so that nothing may depend on those at hand."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def runs_eagerly(x: Tensor) -> bool:
    """Whether what is done with `x` just runs: it is not followed, and no torch.fx graph is made of it."""
    return not followed() and not isinstance(x, Proxy)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see what goes into `module` or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)

"""Whether operations just run: what a layer may do only where nobody follows it."""

import torch
from torch import Tensor
from torch.fx import Proxy


def runs_eagerly(x: Tensor) -> bool:
    """Whether nobody records or transforms what is done with `x`: torch.compile and export, tracing, fx, torch.func."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    transformed = torch._C._are_functorch_transforms_active()
    return not recorded and not transformed and not isinstance(x, Proxy)

"""What a network costs: the order its layers run in, and multiply-accumulates.

Convention for MACs: multiply-accumulates of matrix products and convolutions for one forward pass, attention's own
products included; additions of biases, normalisation, activations and pooling are not counted.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lrconvert.calling import calling
from lrconvert.inputs import Inputs, examples
from lrconvert.layers import family_of, low_rank_modules
from lrconvert.layers.experts import pairs_routed, running
from lrconvert.modes import Unremarkable, evaluating, on_meta, without_fast_path

MAC_CONVENTION = "matrix products and convolutions of one forward pass, batch 1"


@dataclass(frozen=True)
class Trace:
    """What one forward pass of batch 1 showed.

    Attributes:
        positions: layer name to the number of output positions its weight is applied to, in execution order; a layer
            that is called twice counts both calls. Layers that were never called are missing. Of experts these are
            pairs of a token and an expert that it goes to.
        macs: multiply-accumulates of the whole pass.
        halfway: name of a convolution of two dimensions to its input rows × output columns, likewise summed: the
            positions between two factors of which the first runs across and the second down.
        called: names of all modules that were called, whatever they are.
    """

    positions: dict[str, int]
    macs: int
    halfway: dict[str, int]
    called: frozenset[str] = frozenset()


@contextmanager
def countable() -> Iterator[None]:
    """Make torch take the paths that its FLOP counter sees: it misses the fused ones entirely."""
    with without_fast_path(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield


# Called with a module, its positional and named arguments, and what it returned.
Observer = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


def observe(model: nn.Module, inputs: Inputs, batch: int, modules: Iterable[nn.Module], observer: Observer) -> int:
    """Run `model` once on the meta device, where nothing is computed, and show `observer` every call of `modules`.

    Args:
        model: on any device, which it keeps; run in eval mode, and the mode it had is restored.
        inputs: what it is called with.
        batch: examples in that call.
        modules: parts of `model` whose calls matter.
        observer: what is called after each of theirs.

    Returns:
        Multiply-accumulates of the whole pass.

    Raises:
        Exception: whatever the model's forward raises on the meta device.
    """
    arguments, named = examples(inputs, batch, torch.get_default_dtype(), "meta")
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(observer, with_kwargs=True).remove)
        with (
            on_meta(model),
            evaluating(model),
            countable(),
            running(model, "batched_mm"),
            Unremarkable(),
            calling(model),
            FlopCounterMode(display=False) as counter,
        ):
            model(*arguments, **named)
    return counter.get_total_flops() // 2


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """What one call of `model` with one example shows; see `observe`."""
    positions: dict[str, int] = {}
    halfway: dict[str, int] = {}
    # What torch.jit compiled takes no hooks.
    every = {module: name for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)}
    names = {module: name for module, name in every.items() if family_of(module)}
    names |= {module: name for name, module in low_rank_modules(model)}
    called: set[str] = set()

    def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        called.add(every[module])
        name = names.get(module)
        if name is None:
            return
        pairs = pairs_routed(module, (*arguments, *named.values()))
        here = _positions(module, arguments, output) if pairs is None else pairs
        positions[name] = positions.get(name, 0) + here
        if isinstance(module, nn.Conv2d) and arguments:
            rows, columns = arguments[0].shape[-2], output.shape[-1]
            batch = output.numel() // math.prod(output.shape[-3:])
            halfway[name] = halfway.get(name, 0) + batch * rows * columns

    macs = observe(model, inputs, 1, every, record)
    return Trace(positions, macs, halfway, frozenset(called))


def _positions(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> int:
    """Positions of one call that a weight is applied to: pixels, tokens, or time steps."""
    if getattr(module, "transposed", False) and arguments:  # it works at the resolution of its input
        return int(arguments[0].numel()) // int(module.in_channels)  # type: ignore[arg-type]
    while not isinstance(output, Tensor):
        output = output[0]
    channels = getattr(module, "out_channels", None)
    return output.numel() // int(channels or output.shape[-1])

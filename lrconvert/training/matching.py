"""What a factorized network is compared with the dense one in: what it returns, and what its blocks do on the way."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrconvert.errors import ModelError
from lrconvert.heads import Head
from lrconvert.inputs import Call
from lrconvert.layers import LowRank, low_rank_modules
from lrconvert.outputs import floats_in, shown, token_mask


@dataclass(frozen=True, eq=False)
class Seen:
    """What a network computed for one call. Places of hidden tokens are left out: (tokens, …) for (batch, length, …).

    Attributes:
        outputs: what it returned.
        hidden: what each of its blocks returned.
    """

    outputs: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (*self.outputs, *self.hidden)

    def to(self, device: torch.device) -> "Seen":
        """The same on `device`."""
        outputs, hidden = ([tensor.to(device) for tensor in part] for part in (self.outputs, self.hidden))
        return Seen(tuple(outputs), tuple(hidden))


class Watched:
    """A network that is called and looked into.

    Args:
        model: the network.
        blocks: paths of the modules whose outputs are taken.
        head: what of its output counts; without one every floating-point tensor in it.

    Raises:
        ModelError: there is no module at one of the paths.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], head: Head | None = None) -> None:
        self.model, self.blocks, self.head = model, tuple(blocks), head
        known = dict(model.named_modules())
        missing = next((path for path in blocks if path not in known), None)
        if missing is not None:
            raise ModelError(f"the teacher has no {missing}: give the dense network that the factors were made from")

    def __call__(self, call: Call) -> Seen:
        """Run the network on `call`.

        Raises:
            ModelError: it returned no floating-point tensor.
        """
        hidden: dict[str, Tensor] = {}
        hooks = [self.model.get_submodule(path).register_forward_hook(_taking(hidden, path)) for path in self.blocks]
        try:
            returned = call.run(self.model)
        finally:
            for hook in hooks:
                hook.remove()
        mask = token_mask(call, next(self.model.parameters()).device)
        outputs = [self.head(returned, mask)] if self.head else [shown(each, mask) for each in floats_in(returned)]
        if not outputs:
            raise ModelError(f"{type(self.model).__name__} returned no floating-point tensor to imitate")
        return Seen(tuple(outputs), tuple(shown(hidden[path], mask) for path in self.blocks if path in hidden))


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks that `model` is a list of, as far as they hold factors.

    They are the elements of the outermost nn.ModuleList and nn.Sequential with factors in two of its elements or more:
    a transformer's layers, a residual network's blocks.
    """
    return tuple(_blocks_in(model, ""))


def _blocks_in(module: nn.Module, path: str) -> Iterator[str]:
    if isinstance(module, LowRank):
        return
    inside = [
        (f"{path}.{name}".lstrip("."), child) for name, child in module.named_children() if any(low_rank_modules(child))
    ]
    if isinstance(module, nn.ModuleList | nn.Sequential) and len(inside) > 1:
        yield from (name for name, _ in inside)
        return
    for name, child in inside:
        yield from _blocks_in(child, name)


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """‖got − wanted‖² / ‖wanted‖² in float32, a mean over the tensors; a scalar.

    Raises:
        ModelError: they differ in number or shape.
    """
    check_alike(got, wanted)
    errors = [
        (mine.float() - theirs.float()).square().sum() / theirs.float().square().sum().clamp(min=1e-12)
        for mine, theirs in zip(got, wanted, strict=True)
    ]
    return torch.stack(errors).mean()


def check_alike(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raise ModelError when tensors of the two networks differ in number or shape."""
    mine, theirs = ([tuple(tensor.shape) for tensor in tensors] for tensors in (got, wanted))
    if mine != theirs:
        raise ModelError(
            f"the teacher does not fit: it computes {_listed(theirs)} where the factorized network computes "
            f"{_listed(mine)}; give the dense checkpoint that it was made from"
        )


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    odd = ", ".join("×".join(map(str, shape)) for shape in shapes[:3])
    return f"{len(shapes)} tensor(s) of {odd}{', …' if len(shapes) > 3 else ''}"


def _taking(hidden: dict[str, Tensor], path: str) -> Callable[[nn.Module, Any, Any], None]:
    def take(module: nn.Module, args: Any, output: Any) -> None:
        found = floats_in(output)
        if found:
            hidden[path] = found[0]

    return take

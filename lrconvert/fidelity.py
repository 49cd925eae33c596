"""How far the outputs of a compressed model are from those of the dense one, on the same calls."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrconvert.errors import ModelError
from lrconvert.inputs import Call
from lrconvert.modes import evaluating
from lrconvert.outputs import floats_in, shown, token_mask


@dataclass(frozen=True, eq=False)
class Output:
    """What a model returned for one call.

    Attributes:
        tensors: every floating-point tensor in it; of one with a place for each token, only the places that the call's
            attention mask shows, (tokens, …).
        logits: (examples, classes), where the output is one such tensor, or has one called `logits`.
    """

    tensors: tuple[Tensor, ...]
    logits: Tensor | None


@dataclass(frozen=True)
class Fidelity:
    """How near outputs are to those that were wanted.

    Attributes:
        error: ‖y′ − y‖ / ‖y‖ over all outputs of all calls together; ‖y′‖ where y is zero.
        agreement: share of the examples whose largest logit is in the same place; None where there are no logits.
    """

    error: float
    agreement: float | None


def outputs_of(model: nn.Module, calls: Iterable[Call]) -> Iterator[Output]:
    """What `model` returns for each of `calls`, which is run only when its turn comes.

    Args:
        model: run in eval mode, without gradients; its mode is restored after each call.
        calls: what it is called with.
    """
    for call in calls:
        with evaluating(model), torch.no_grad():
            returned = call.run(model)
        floats = floats_in(returned)
        mask = token_mask(call, floats[0].device) if floats else None
        yield Output(tuple(shown(tensor, mask) for tensor in floats), _logits(returned))


def fidelity(got: Iterable[Output], wanted: Iterable[Output]) -> Fidelity:
    """Compare the outputs of two models for the same calls, one call at a time.

    Both may be what `outputs_of` returns, and then no more than one call's outputs are in memory; the dense model's are
    worth keeping in a list where several models are compared with it.

    Args:
        got: of the compressed model.
        wanted: of the dense one.

    Raises:
        ModelError: the outputs differ in number or shape.
    """
    same = logits = 0

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal same, logits
        for mine, theirs in zip(got, wanted, strict=True):
            shapes = [[tuple(tensor.shape) for tensor in output.tensors] for output in (mine, theirs)]
            if shapes[0] != shapes[1]:
                raise ModelError(f"outputs of shapes {shapes[0]} cannot be compared with outputs of shapes {shapes[1]}")
            yield from zip(mine.tensors, theirs.tensors, strict=True)
            if mine.logits is not None and theirs.logits is not None:
                same += int((mine.logits.argmax(1) == theirs.logits.argmax(1).to(mine.logits.device)).sum())
                logits += len(theirs.logits)

    error = distance(pairs())
    return Fidelity(error, same / logits if logits else None)


def distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """‖y′ − y‖ / ‖y‖ over all pairs (y′, y) of tensors together; ‖y′‖ where y is zero."""
    difference = size = 0.0
    for mine, y in pairs:
        y = y.double()
        difference += float((mine.to(y) - y).square().sum())
        size += float(y.square().sum())
    return math.sqrt(difference / (size or 1.0))


def _logits(returned: Any) -> Tensor | None:
    found = returned if isinstance(returned, Tensor) else getattr(returned, "logits", None)
    return found if isinstance(found, Tensor) and found.ndim == 2 and found.shape[1] > 1 else None

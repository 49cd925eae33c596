"""The steps of a factorized LSTM with a backward pass of its own, for training.

Autograd would take each step back alone and add up the factors' gradients one step after the other, each time all of
their elements. Here only what one step hands to the one before it is computed step by step (backpropagation through
time); a factor's gradient is one product over all steps.

Shapes: steps T, batch B, hidden h, four gates, factorized in one to four groups of rank r. `shares` is what the inputs
and the biases add to the gates.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrconvert.layers.packed import packed_products, worth_packing


class LSTMSteps(torch.autograd.Function):
    """(shares (4, T, B, h), hidden (B, h), cell (B, h), u (groups·r, h), v (4·h, r)) → outputs, and the last state.

    The outputs are (T, B, h), the last hidden state and cell (B, h). What follows them is for the backward pass.
    """

    @staticmethod
    def forward(shares: Tensor, hidden: Tensor, cell: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """All steps, each from the state of the one before."""
        gates, steps, batch, width = shares.shape
        groups = len(u) // v.shape[1]
        activations = shares.new_empty(steps, gates, batch, width)
        cells, outputs = (shares.new_empty(steps, batch, width) for _ in range(2))
        inner = shares.new_empty(steps, batch, len(u))
        narrow, widen = _products(u.unsqueeze(0), batch), _products(v.unflatten(0, (groups, -1)), batch)
        for step, now in enumerate(activations):
            inner[step] = narrow(hidden.unsqueeze(0))[0]
            torch.add(shares[:, step], _by_gate(widen(_by_group(inner[step], groups)), width), out=now)
            enter, forget, new, leave = now
            now[:2].sigmoid_()
            new.tanh_()
            leave.sigmoid_()
            cell = torch.mul(forget, cell, out=cells[step]).addcmul_(enter, new)
            hidden = torch.tanh(cell, out=outputs[step]).mul_(leave)
        return outputs, hidden.clone(), cell.clone(), activations, cells, inner

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the way back needs."""
        _, _, _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        # Not the outputs: they may be changed in place.
        ctx.save_for_backward(*inputs, *kept)

    @staticmethod
    def backward(
        ctx: Any, by_outputs: Tensor | None, by_hidden: Tensor | None, by_cell: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the five inputs; `by_…` are those of the results."""
        *inputs, activations, cells, inner = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: what follows has no derivative itself
            return _differentiable_gradients(inputs, (by_outputs, by_hidden, by_cell), ctx.needs_input_grad)
        _, hidden, cell, u, v = inputs
        steps, gates, batch, width = activations.shape
        groups, rank = len(u) // v.shape[1], v.shape[1]
        enter, forget, new, leave = activations.unbind(1)
        # What does not depend on the later steps: the slopes of a step's results by the gates before they are squashed.
        tanh = cells.tanh()
        by_leave, cell_by_hidden = tanh * leave * (1 - leave), leave * (1 - tanh * tanh)
        before = torch.cat([cell.unsqueeze(0), cells[:-1]])
        by_others = torch.stack(
            [new * enter * (1 - enter), before * forget * (1 - forget), enter * (1 - new * new)], dim=1
        )
        d_shares, d_inner = activations.new_empty(gates, steps, batch, width), torch.empty_like(inner)
        d_hidden = torch.zeros_like(hidden) if by_hidden is None else by_hidden.clone()
        d_cell = torch.zeros_like(cell) if by_cell is None else by_cell.clone()
        narrow, widen = _products(u.T.unsqueeze(0), batch), _products(v.unflatten(0, (groups, -1)).mT, batch)
        for step in reversed(range(steps)):
            if by_outputs is not None:
                d_hidden = d_hidden + by_outputs[step]
            torch.mul(d_hidden, by_leave[step], out=d_shares[3, step])
            d_cell.addcmul_(d_hidden, cell_by_hidden[step])
            torch.mul(d_cell, by_others[step], out=d_shares[:3, step])
            d_cell.mul_(forget[step])
            by_group = d_shares[:, step].unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
            d_inner[step] = widen(by_group).transpose(0, 1).flatten(1)
            d_hidden = narrow(d_inner[step].unsqueeze(0))[0]
        d_u = d_v = None
        if ctx.needs_input_grad[3]:
            starts = torch.cat([hidden.unsqueeze(0), (leave * tanh)[:-1]]).flatten(0, 1)
            d_u = d_inner.flatten(0, 1).T @ starts
        if ctx.needs_input_grad[4]:
            each_inner = inner.view(steps * batch, groups, rank).transpose(0, 1).repeat_interleave(gates // groups, 0)
            d_v = torch.bmm(d_shares.flatten(1, 2).mT, each_inner).flatten(0, 1)
        return d_shares, d_hidden, d_cell, d_u, d_v


def _differentiable_gradients(
    inputs: Sequence[Tensor], by_results: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs as functions that autograd can differentiate, for which all steps are taken again."""
    shares, hidden, cell, u, v = inputs
    outputs = []
    v = v.unflatten(0, (len(u) // v.shape[1], -1))
    for share in shares.unbind(1):
        wide = torch.bmm(_by_group(hidden @ u.T, len(v)), v.mT)
        hidden, cell = lstm_cell(share + _by_gate(wide, hidden.shape[1]), cell)
        outputs.append(hidden)
    results = [(result, by) for result, by in zip((torch.stack(outputs), hidden, cell), by_results, strict=True)]
    given = [(result, by) for result, by in results if by is not None]
    wanted = [each for each, need in zip(inputs, needed, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in given], wanted, [by for _, by in given], create_graph=True, allow_unused=True
        )
    )
    return tuple(next(found) if need else None for need in needed)


def lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The next hidden state, before a projection, and cell (B, h), of gates (4, B, h) that are not squashed yet."""
    enter, forget, new, leave = gates.unbind(0)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def _by_group(inner: Tensor, groups: int) -> Tensor:
    """(groups, B, r) of (B, groups·r)."""
    return inner.unflatten(1, (groups, -1)).transpose(0, 1)


def _by_gate(wide: Tensor, width: int) -> Tensor:
    """(4, B, h) of (groups, B, 4/groups·h)."""
    return wide.unflatten(2, (-1, width)).transpose(1, 2).flatten(0, 1)


def _products(weights: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """The function from x (groups, rows, in) to (groups, rows, out), for weights (groups, out, in)."""
    if worth_packing(weights):
        return packed_products(weights, rows)
    return lambda x: torch.bmm(x, weights.mT)

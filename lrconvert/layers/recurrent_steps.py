"""A factorized recurrent layer run step by step on its factors, without the dense weights.

The input's share of all gates is computed for the whole sequence at once; a step multiplies only the state, by two thin
matrices. Shapes: time T, batch B, hidden h; gates are kept apart, (gates, B, h).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from lrconvert.layers.eager import followed
from lrconvert.layers.layer import factor_name
from lrconvert.layers.lstm_steps import LSTMSteps, lstm_cell
from lrconvert.layers.packed import packed_products, worth_packing

if TYPE_CHECKING:
    from lrconvert.layers.recurrent import LowRankRecurrent, State

Product = Callable[[Tensor], Tensor]


def run(
    layer: "LowRankRecurrent", input: Tensor, state: "State", products: Mapping[str, Product]
) -> tuple[Tensor, "State"]:
    """What the dense module returns for `input` (T, B, in) and an initial state.

    `products` are some weights' by name, where there are faster ones than those that are made here.
    """
    parts = state if isinstance(state, tuple) else (state,)
    last: list[tuple[Tensor, ...]] = []
    directions = 2 if layer.bidirectional else 1
    for number in range(layer.num_layers):
        outputs = []
        for direction in range(directions):
            index = number * directions + direction
            sequence = input.flip(0) if direction else input
            start = tuple(part[index] for part in parts)
            output, end = _one(layer, layer.weight_names[index], sequence, start, products)
            outputs.append(output.flip(0) if direction else output)
            last.append(end)
        input = torch.cat(outputs, 2) if directions == 2 else outputs[0]
        if number < layer.num_layers - 1:
            input = functional.dropout(input, layer.dropout, layer.training)
    stacked = tuple(torch.stack(part) for part in zip(*last, strict=True))
    return input, stacked[0] if len(stacked) == 1 else (stacked[0], stacked[1])


def _one(
    layer: "LowRankRecurrent",
    names: list[str],
    input: Tensor,
    state: tuple[Tensor, ...],
    products: Mapping[str, Product],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction: outputs (T, B, out) and the last state."""
    gates = layer.gates
    ih, hh, *rest = names
    biases = [getattr(layer, name).view(gates, 1, -1) for name in rest if name.startswith("bias")]
    from_input, recur = (products.get(name) or _product(layer, name, gates) for name in (ih, hh))
    shares = from_input(input.flatten(0, 1))
    step: Callable[..., tuple[Tensor, ...]]
    if layer.mode == "GRU":
        # The new gate's recurrent bias is inside its product with the reset gate.
        step = _gru(recur, biases[1] if biases else None)
        biases = biases[:1]
    elif layer.mode == "LSTM":
        project = (
            _linear(layer, next(name for name in rest if name.startswith("weight_hr"))) if layer.proj_size else None
        )
        step = _lstm(recur, project)
    else:
        step = _rnn(recur, torch.tanh if layer.mode == "RNN_TANH" else torch.relu)
    if biases:
        shares = shares + sum(biases)
    shares = shares.unflatten(1, input.shape[:2])
    if _is_plain_lstm(layer, hh):
        factors: Any = layer.get_submodule(factor_name(hh))
        inputs = (shares, *state, factors.u.weight, factors.v.weight)
        if _in_training(inputs):
            output, hidden, cell, *_ = LSTMSteps.apply(*inputs)
            return output, (hidden, cell)
    outputs = []
    for share in shares.unbind(1):
        state = step(share, *state)
        outputs.append(state[0])
    return torch.stack(outputs), state


def _is_plain_lstm(layer: "LowRankRecurrent", hh: str) -> bool:
    """Whether `LSTMSteps` knows these steps."""
    return layer.mode == "LSTM" and not layer.proj_size and hh in layer.factored


def _in_training(inputs: Sequence[Tensor]) -> bool:
    """Whether there is a way back through `inputs`, and `LSTMSteps` may take it."""
    wanted = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    return wanted and not watched() and all(each.is_cpu and each.dtype == inputs[0].dtype for each in inputs)


def watched() -> bool:
    """Whether somebody has to see each operation: to record it, to transform it, or to change its dtype."""
    return followed() or torch.is_autocast_enabled("cpu")


def _product(layer: "LowRankRecurrent", name: str, gates: int) -> Product:
    """The function from x (N, in) to the weight `name` times x, gate by gate: (gates, N, h)."""
    factored = layer.factored.get(name)
    if factored is None or factored.groups == 1:
        apply = _linear(layer, name)
        return lambda x: apply(x).unflatten(1, (gates, -1)).transpose(0, 1)
    factors: Any = layer.get_submodule(factor_name(name))
    u, v = factors.u.weight, factors.v.weight.unflatten(0, (gates, -1)).mT

    def product(x: Tensor) -> Tensor:
        return torch.bmm(functional.linear(x, u).unflatten(1, (gates, -1)).transpose(0, 1), v)

    return product


def packed_product(layer: "LowRankRecurrent", name: str, rows: int) -> Product | None:
    """What `_product` makes, for inference on `rows` rows: of factors that oneDNN keeps in a layout of its own.

    None for a weight that is not factorized, or where that would not pay.
    """
    factored = layer.factored.get(name)
    if factored is None:
        return None
    factors: Any = layer.get_submodule(factor_name(name))
    u, v = factors.u.weight.unsqueeze(0), factors.v.weight.unflatten(0, (factored.groups, -1))
    if not worth_packing(v):
        return None
    narrow, widen = packed_products(u, rows), packed_products(v, rows)

    def product(x: Tensor) -> Tensor:
        wide = widen(narrow(x.unsqueeze(0))[0].unflatten(1, (factored.groups, -1)).transpose(0, 1))
        return wide if len(wide) > 1 else wide[0].unflatten(1, (layer.gates, -1)).transpose(0, 1)

    return product


def _linear(layer: "LowRankRecurrent", name: str) -> Product:
    """The function from x (N, in) to (N, out)."""
    if name not in layer.factored:
        weight = getattr(layer, name)
        return lambda x: functional.linear(x, weight)
    factors: Any = layer.get_submodule(factor_name(name))
    return lambda x: factors(x)


def _lstm(recur: Product, project: Product | None) -> Callable[..., tuple[Tensor, ...]]:
    def step(share: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        hidden, cell = lstm_cell(share + recur(hidden), cell)
        return project(hidden) if project else hidden, cell

    return step


def _gru(recur: Product, bias: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    def step(share: Tensor, hidden: Tensor) -> tuple[Tensor]:
        own = recur(hidden) if bias is None else recur(hidden) + bias
        reset, update = torch.sigmoid(share[:2] + own[:2]).unbind(0)
        new = torch.tanh(share[2] + reset * own[2])
        return (torch.lerp(new, hidden, update),)

    return step


def _rnn(recur: Product, activation: Product) -> Callable[..., tuple[Tensor, ...]]:
    def step(share: Tensor, hidden: Tensor) -> tuple[Tensor]:
        return (activation((share + recur(hidden))[0]),)

    return step

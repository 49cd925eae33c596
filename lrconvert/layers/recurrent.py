"""nn.LSTM, nn.GRU and nn.RNN: every gate's matrices are factorized on their own (Pufferfish section 2.2).

A weight of stacked gates (gates·hidden, in) becomes `ih_l0.u` (gates·rank, in) and `ih_l0.v` (gates·hidden, rank), all
gates at one rank. Biases stay where they were. There are two ways to run: the factors step by step in
`recurrent_steps`, and torch's fused operator on the weights multiplied out; `_steps_pay` chooses.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lrconvert.layers import recurrent_steps
from lrconvert.layers.composite import LowRankComposite
from lrconvert.layers.layer import factor_name
from lrconvert.layers.lowrank import Factored

RECURRENT_TYPES: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
# By mode, the gates stacked in a weight.
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_FUSED: dict[str, Any] = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}

# Multiply-accumulates that a step must save to pay for itself (benchmarks/recurrent.py). In training the other way
# costs more, and an LSTM has a backward pass of its own.
_LEAST_SAVED = 20_000_000
_LEAST_SAVED_TRAINING = {"LSTM": 6_000_000, "GRU": 12_000_000, "RNN_TANH": 12_000_000, "RNN_RELU": 12_000_000}

Sequence = Tensor | PackedSequence
State = Tensor | tuple[Tensor, Tensor]


class LowRankRecurrent(LowRankComposite):
    """Takes the place of an nn.LSTM, nn.GRU or nn.RNN, with its forward signature and results."""

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        assert isinstance(dense, nn.RNNBase)
        for name, buffer in dense.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in dense._non_persistent_buffers_set)
        self.mode, self.gates = dense.mode, GATES[dense.mode]
        self.hidden_size, self.proj_size, self.num_layers = dense.hidden_size, dense.proj_size, dense.num_layers
        self.batch_first, self.bidirectional, self.dropout = dense.batch_first, dense.bidirectional, dense.dropout
        # Weights and biases in the order that the fused operator takes them, one list for each layer and direction.
        names = list(dense._flat_weights_names)
        each = len(names) // (dense.num_layers * (2 if dense.bidirectional else 1))
        self.weight_names = [names[start : start + each] for start in range(0, len(names), each)]
        self._has_biases = dense.bias
        self._saved = self._saved_macs()
        self._kept: tuple[Any, dict[str, Any]] | None = None

    def flatten_parameters(self) -> None:
        """Nothing: the factors are not one block of memory. For code that calls it, as it does on nn.LSTM."""

    def forward(self, input: Sequence, hx: State | None = None) -> tuple[Sequence, State]:
        """What the dense module returns: outputs, and the last state.

        Shapes are those of torch.nn.LSTM, nn.GRU and nn.RNN, packed or not, with or without a batch.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        hx = tuple(hx) if isinstance(hx, list) else hx
        batched, batch = input.dim() == 3, 0 if self.batch_first else 1
        if not input.shape[1 if batched and self.batch_first else 0]:
            raise RuntimeError("expected at least one time step, found none")
        if not batched:
            input = input.unsqueeze(batch)
            hx = _each(hx, lambda state: state.unsqueeze(1))
        state = self._checked(hx, input.shape[batch], input)
        if self._steps_pay(input, input.shape[batch]):
            time_first = input.transpose(0, 1) if self.batch_first else input
            output, last = recurrent_steps.run(self, time_first, state, self._packed_products(input))
            output = output.transpose(0, 1) if self.batch_first else output
        else:
            output, *rest = self._fused(input, state)
            last = _state(rest)
        if not batched:
            return output.squeeze(batch), _each(last, lambda state: state.squeeze(1))
        return output, last

    def _packed(self, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        data, sizes, order, back = packed
        if order is not None:
            hx = _each(hx, lambda state: state.index_select(1, order))
        output, *rest = self._fused(data, self._checked(hx, int(sizes[0]), data), sizes)
        last = _state(rest)
        if back is not None:
            last = _each(last, lambda state: state.index_select(1, back))
        return PackedSequence(output, sizes, order, back), last

    def _checked(self, hx: State | None, batch: int, like: Tensor) -> State:
        """The initial state: zeros unless given, in which case its shape is checked."""
        layers = len(self.weight_names)
        shapes = [(layers, batch, self.proj_size or self.hidden_size)]
        if self.mode == "LSTM":
            shapes.append((layers, batch, self.hidden_size))
        if hx is None:
            return _state([torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes])
        found = [tuple(state.shape) for state in (hx if isinstance(hx, tuple) else (hx,))]
        if found != shapes:
            raise RuntimeError(f"the initial state has shape {found}, expected {shapes}")
        return hx

    def _fused(self, input: Tensor, state: State, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Torch's own operator on the weights multiplied out; with `sizes`, on a packed sequence."""
        data: tuple[Any, ...] = (input, state) if sizes is None else (input, sizes, state)
        shape = (self.num_layers, self.dropout, self.training, self.bidirectional)
        layout = (self.batch_first,) if sizes is None else ()
        found: tuple[Tensor, ...] = _FUSED[self.mode](*data, self._weights(), self._has_biases, *shape, *layout)
        return found

    def _weights(self) -> list[Tensor]:
        """All weights and biases, multiplied out; in inference kept until a factor changes."""
        kept = self._kept_products()
        if kept is not None and "fused" in kept:
            return kept["fused"]
        weights = [self.product(name) for group in self.weight_names for name in group]
        if kept is not None:
            kept["fused"] = weights
        return weights

    def _packed_products(self, input: Tensor) -> Mapping[str, recurrent_steps.Product]:
        """By name, the products with weights that are wide enough to be laid out for oneDNN, in inference only."""
        kept = self._kept_products()
        if kept is None:
            return {}
        if "packed" not in kept:
            rows = input.shape[0] * input.shape[1]
            batch = input.shape[0 if self.batch_first else 1]
            kept["packed"] = {
                name: product
                for ih, hh, *_ in self.weight_names
                for name, times in ((ih, rows), (hh, batch))
                if (product := recurrent_steps.packed_product(self, name, times)) is not None
            }
        return kept["packed"]

    def _kept_products(self) -> dict[str, Any] | None:
        """Where to keep what is made of the factors until one of them changes; None where that could go unnoticed."""
        parameters = list(self.parameters())
        if torch.is_grad_enabled() or self.training or recurrent_steps.watched() or not parameters[0].is_cpu:
            self._kept = None
            return None
        try:
            # The sums see what changes behind the counters' back, through `.data`. Biases are never copied.
            now = tuple(
                (each.data_ptr(), each._version, float(each.sum()) if each.dim() > 1 else 0.0) for each in parameters
            )
        except RuntimeError:  # tensors made in inference mode do not count their changes
            return None
        if self._kept is None or self._kept[0] != now:
            self._kept = (now, {})
        return self._kept[1]

    def _steps_pay(self, input: Tensor, batch: int) -> bool:
        """Whether the step-by-step execution is the faster one (measured by benchmarks/recurrent.py).

        A step costs some dozen small operations; it pays where the products that it saves cost more, which they do
        on a CPU for wide layers. A GPU runs all steps in one fused kernel. On the meta device nothing runs, and the
        steps are what is counted.
        """
        if input.is_meta:
            return True
        if torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled():
            return True  # the compiler has no gradient for the fused operator
        if not input.is_cpu or torch.compiler.is_compiling():
            return False
        return batch * self._saved >= (_LEAST_SAVED_TRAINING[self.mode] if torch.is_grad_enabled() else _LEAST_SAVED)

    def _saved_macs(self) -> float:
        """What a step saves for one row of the batch, on the average of layers and directions."""
        names = [name for group in self.weight_names for name in group if name.startswith("weight_hh")]
        saved = 0
        for name in names:
            if name in self.factored:
                factors = self.get_submodule(factor_name(name))
                saved += math.prod(self.factored[name].shape) - sum(each.numel() for each in factors.parameters())
        return saved / len(names)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files hold the factors only."""
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        """The dense module's own description, and the ranks."""
        ranks = ", ".join(f"{factor_name(name)} rank {factored.rank}" for name, factored in self.factored.items())
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, {ranks}"


def _state(parts: list[Tensor]) -> State:
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _each(state: Any, change: Any) -> Any:
    """`change` applied to each tensor of a state, if there is one."""
    if state is None:
        return None
    return tuple(change(part) for part in state) if isinstance(state, tuple) else change(state)

"""A graph as a module that onnxruntime runs, for calibration. There are no gradients in it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnxruntime
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from lrconvert.errors import UsageError
from lrconvert.layers import Layer
from lrconvert.onnx_graph.check import first_line, session_of
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.inputs import array_of, inputs_of
from lrconvert.onnx_graph.scopes import Value
from lrconvert.onnx_graph.tensors import read_tensor
from lrconvert.onnx_graph.weights import Path, Weight, attribute

_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
# What numpy has, and with it onnxruntime's inputs.
_FEEDABLE = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16)


class _GraphModule(nn.Module):
    """Holds weights of a graph, and the biases that may make up for their errors, as parameters.

    These are the weights that Conv, Gemm and MatMul nodes of the main graph multiply by, in the shapes of their layers.
    Others, of bodies and of recurrent operators, stay as they are in the graph.

    Args:
        graph: with its weights.
        weights: those to hold.
    """

    session: onnxruntime.InferenceSession

    def __init__(self, graph: Graph, weights: Sequence[Weight]) -> None:
        super().__init__()
        self.graph, self.weights = graph, tuple(weights)
        tensors, where = graph.tensors(), str(graph.path)
        found = {weight.layer.weight: tensors[weight.layer.weight].read() for weight in weights}
        for weight in weights:
            if weight.bias is not None and weight.bias.tensor is not None:
                found[weight.layer.bias_key] = read_tensor(weight.bias.tensor, graph.path.parent, where).flatten()
        kinds = {each.type.tensor_type.elem_type for each in inputs_of(graph)}
        is_double = TensorProto.DOUBLE in kinds or any(each.dtype == torch.float64 for each in found.values())
        dtype = torch.float64 if is_double else torch.float32
        self.held = {key: nn.Parameter(tensor.to(dtype), requires_grad=False) for key, tensor in found.items()}
        for number, parameter in enumerate(self.held.values()):
            self.register_parameter(f"p{number}", parameter)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by the keys that layers have for them, which are no names of attributes."""
        yield from self.held.items()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        """The graph's outputs of real numbers.

        Raises:
            UsageError: the graph takes other inputs, or onnxruntime cannot run it with these.
        """
        raise NotImplementedError

    def feed(self, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The arrays that the graph takes, by name."""
        wanted = {each.name: each for each in inputs_of(self.graph)}
        tensors = dict(zip(wanted, args, strict=False)) | dict(kwargs)
        if len(args) > len(wanted) or tensors.keys() != wanted.keys():
            given = ", ".join((*("a tensor" for _ in args), *kwargs))
            raise UsageError(f"{self.graph.path} takes {', '.join(wanted)}, but the examples give {given}")
        return {name: array_of(wanted[name], tensor) for name, tensor in tensors.items()}

    def load(self, probes: Sequence[str] = (), given: Mapping[str, TensorProto] | None = None) -> None:
        """Make the session; see `session_of`."""
        try:
            self.session = session_of(self.graph, probes, given or {})
        except Exception as error:
            raise UsageError(
                f"onnxruntime cannot load {self.graph.path} ({first_line(error)}): leave the examples out"
            ) from error

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the session returns, by name."""
        try:
            returned = self.session.run(None, feed)
        except Exception as error:
            raise UsageError(f"{self.graph.path} cannot be run with these examples: {first_line(error)}") from error
        return dict(zip([output.name for output in self.session.get_outputs()], returned, strict=True))

    def outputs(self, values: Mapping[str, object]) -> tuple[Tensor, ...]:
        """The graph's own outputs of real numbers among `values`."""
        arrays = [values[output.name] for output in self.graph.model.graph.output]
        return tuple(
            torch.from_numpy(each) for each in arrays if isinstance(each, np.ndarray) and each.dtype.kind == "f"
        )


class AdjustableGraph(_GraphModule):
    """Runs a graph with the module's parameters as its weights; it is slower, as nothing of them can be prepared.

    Args:
        graph: with its weights.
        layers: of them; those that numpy has no numbers for stay as they are.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer]) -> None:
        super().__init__(
            graph, [weight for weight in _multiplied(graph, layers) if weight.tensor.data_type in _FEEDABLE]
        )
        self.constants: list[tuple[str, Value, Weight | None]] = []
        for weight in self.weights:
            self.constants.append((weight.layer.weight, weight.value, weight))
            if weight.bias is not None:
                self.constants.append((weight.layer.bias_key, weight.bias, None))
        self.load(given={value.name: value.tensor for _, value, _ in self.constants if value.tensor is not None})

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        """The graph's outputs; see `_GraphModule.forward`."""
        return self.outputs(self.run(self.feed(args, kwargs) | self._stored()))

    def _stored(self) -> dict[str, np.ndarray]:
        """The parameters as the graph has them."""
        stored = {}
        for key, value, weight in self.constants:
            assert value.tensor is not None
            tensor = self.held[key].detach().cpu()
            tensor = tensor.reshape(tuple(value.tensor.dims)) if weight is None else weight.as_stored(tensor)
            stored[value.name] = tensor.numpy().astype(helper.tensor_dtype_to_np_dtype(value.tensor.data_type))
        return stored


class WatchedGraph(_GraphModule):
    """Runs a graph, then every product with its weights once more in torch, where calibration sees them.

    Args:
        graph: with its weights.
        layers: of them.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer]) -> None:
        super().__init__(graph, _multiplied(graph, layers))
        self.products = [(weight, path) for weight in self.weights for path in weight.paths]
        known = {each.name for each in (*inputs_of(graph), *graph.model.graph.output)}
        self.load(list(dict.fromkeys(name for _, path in self.products if (name := _other(path)) not in known)))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        """The graph's outputs; see `_GraphModule.forward`."""
        feed = self.feed(args, kwargs)
        values = feed | self.run(feed)
        for weight, path in self.products:
            parameter, bias = self.held[weight.layer.weight], self.held.get(weight.layer.bias_key)
            node = path.use.node
            assert node is not None
            x = torch.from_numpy(values[_other(path)]).to(parameter)
            if parameter.dim() == 2:
                is_turned = x.dim() > 1 and (path.use.slot == 0 or bool(attribute(node, "transA", 0)))
                functional.linear(x.mT if is_turned else x, parameter, bias)
            else:
                _convolve(x, parameter, bias, node)
        return self.outputs(values)


def _multiplied(graph: Graph, layers: Sequence[Layer]) -> list[Weight]:
    """The weights of `layers` whose every use is a product in the main graph, all of one side of the matrix.

    What a body's product or one with the transpose meets is not known: it would be left out of the error.
    """

    def is_known(weight: Weight) -> bool:
        if weight.layer.kind not in ("linear", "conv1d", "conv2d", "conv3d"):
            return False
        return all(
            path.use.graph is graph.model.graph
            and (weight.layer.kind != "linear" or path.wants_in_first == weight.in_first)
            for path in weight.paths
        )

    weights = {weight.layer.name: weight for weight in graph.weights}
    found = (weights[layer.name] for layer in layers if not layer.dense_reason)
    return [weight for weight in found if is_known(weight)]


def _other(path: Path) -> str:
    """Name of what an operator multiplies a weight by."""
    assert path.use.node is not None
    return str(path.use.node.input[1 - path.use.slot])


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, node: NodeProto) -> Tensor:
    """What a Conv node makes of x.

    https://onnx.ai/onnx/operators/onnx__Conv.html
    """
    given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    sizes, dims = weight.shape[2:], weight.dim() - 2
    strides, apart = given.get("strides", [1] * dims), given.get("dilations", [1] * dims)
    auto = given.get("auto_pad", b"NOTSET").decode()
    pads = list(given.get("pads", [0] * 2 * dims)) if auto == "NOTSET" else [0] * 2 * dims
    if auto.startswith("SAME"):
        for axis in range(dims):
            size, span = x.shape[2 + axis], (sizes[axis] - 1) * apart[axis] + 1
            total = max((-(-size // strides[axis]) - 1) * strides[axis] + span - size, 0)
            less, more = total // 2, total - total // 2
            pads[axis], pads[dims + axis] = (less, more) if auto == "SAME_UPPER" else (more, less)
    x = functional.pad(x, [size for axis in reversed(range(dims)) for size in (pads[axis], pads[dims + axis])])
    group = int(given.get("group", 1))
    return _CONVOLUTIONS[weight.dim()](x, weight, bias, list(strides), 0, list(apart), group)

"""A graph as a module that onnxruntime runs. There are no gradients in it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnxruntime
import torch
from onnx import NodeProto, helper
from torch import Tensor, nn
from torch.nn import functional

from lrconvert.errors import UsageError
from lrconvert.layers import Layer
from lrconvert.onnx_graph.check import session_of
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.inputs import array_of, inputs_of
from lrconvert.onnx_graph.weights import Path, Weight, attribute

_CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


class GraphModule(nn.Module):
    """Runs a graph with the module's parameters as its weights.

    These are the weights that Conv, Gemm and MatMul nodes of the main graph multiply by, in the shapes of their layers.
    Others, of bodies and of recurrent operators, stay as they are in the graph.

    Args:
        graph: with its weights.
        layers: of them.

    Attributes:
        layers: those whose weights are parameters here, and named so.
    """

    def __init__(self, graph: Graph, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.graph = graph
        tensors, weights = graph.tensors(), {weight.layer.name: weight for weight in graph.weights}
        self.weights: dict[str, Weight] = {}
        found: list[Layer] = []
        for layer in layers:
            if not layer.dense_reason and _products(graph, weights[layer.name]):
                parameter = f"weight{len(found)}"
                data = tensors[layer.weight].read().float()
                self.register_parameter(parameter, nn.Parameter(data, requires_grad=False))
                self.weights[parameter] = weights[layer.name]
                found.append(replace(layer, weight=parameter))
        self.layers = tuple(found)
        self.session = self._session()

    def _session(self) -> onnxruntime.InferenceSession:
        return session_of(self.graph, given=[weight.tensor for weight in self.weights.values()])

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        """The graph's outputs.

        Raises:
            UsageError: the graph takes other inputs, or onnxruntime cannot run it with these.
        """
        return self._outputs(self._run(self._feed(args, kwargs) | self._stored()))

    def _stored(self) -> dict[str, np.ndarray]:
        """The parameters as the graph has them."""
        inputs = {each.name: each for each in self.session.get_inputs()}
        kinds = {"tensor(float16)": np.float16, "tensor(double)": np.float64}
        return {
            weight.tensor.name: weight.as_stored(self.get_parameter(name).detach().cpu())
            .numpy()
            .astype(kinds.get(inputs[weight.tensor.name].type, np.float32))
            for name, weight in self.weights.items()
        }

    def _feed(self, args: Sequence[Tensor], kwargs: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The arrays that the graph takes, by name."""
        wanted = {each.name: each for each in inputs_of(self.graph)}
        tensors = dict(zip(wanted, args, strict=False)) | kwargs
        if len(args) > len(wanted) or tensors.keys() != wanted.keys():
            given = ", ".join((*("a tensor" for _ in args), *kwargs))
            raise UsageError(f"{self.graph.path} takes {', '.join(wanted)}, but the examples give {given}")
        return {name: array_of(wanted[name], tensor) for name, tensor in tensors.items()}

    def _run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the session returns, by name."""
        try:
            returned = self.session.run(None, feed)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(f"{self.graph.path} cannot be run with these examples: {reason}") from error
        return dict(zip([output.name for output in self.session.get_outputs()], returned, strict=True))

    def _outputs(self, values: dict[str, np.ndarray]) -> tuple[Tensor, ...]:
        arrays = [values[output.name] for output in self.graph.model.graph.output]
        return tuple(torch.from_numpy(array) for array in arrays if isinstance(array, np.ndarray))


class GraphProducts(GraphModule):
    """Runs a graph, then every product with its weights once more in torch, where calibration sees them."""

    def _session(self) -> onnxruntime.InferenceSession:
        given = {each.name for each in inputs_of(self.graph)}
        self.products = [
            (name, path) for name, weight in self.weights.items() for path in _products(self.graph, weight)
        ]
        read = dict.fromkeys(_other(path) for _, path in self.products)
        return session_of(self.graph, [name for name in read if name not in given])

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
        """The graph's outputs; see `GraphModule.forward`."""
        feed = self._feed(args, kwargs)
        values = feed | self._run(feed)
        for name, path in self.products:
            weight, node = self.get_parameter(name), path.use.node
            x = torch.from_numpy(values[_other(path)]).to(weight)
            if node is not None and weight.dim() == 2:
                is_turned = path.use.slot == 0 or bool(attribute(node, "transA", 0))
                functional.linear(x.mT if is_turned else x, weight)
            elif node is not None:
                _convolve(x, weight, node)
        return self._outputs(values)


def _products(graph: Graph, weight: Weight) -> list[Path]:
    """The products with `weight` in the main graph; those that want its transpose see another side of it."""
    paths = [path for path in weight.paths if path.use.graph is graph.model.graph]
    if weight.layer.kind == "linear":
        return [path for path in paths if path.wants_in_first == weight.in_first]
    return paths if weight.layer.kind in ("conv1d", "conv2d", "conv3d") else []


def _other(path: Path) -> str:
    """Name of what an operator multiplies a weight by."""
    assert path.use.node is not None
    return str(path.use.node.input[1 - path.use.slot])


def _convolve(x: Tensor, weight: Tensor, node: NodeProto) -> Tensor:
    """What a Conv node makes of x, without its bias.

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
    return _CONVOLUTIONS[weight.dim()](x, weight, None, list(strides), 0, list(apart), group)

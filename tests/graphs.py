"""Small ONNX graphs, built node by node, and how tests run them."""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def tensor(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def random(*shape, scale=0.2, dtype=np.float32):
    return (scale * torch.randn(shape, dtype=torch.float64).numpy()).astype(dtype)


def graph(path, nodes, inputs, constants, outputs=("y",), opset=18, kind=FLOAT, **extra):
    """Write a graph. `inputs`: name to shape (None for an open size) or ValueInfoProto; `constants`: name to array."""
    given = [
        shape if isinstance(shape, onnx.ValueInfoProto) else helper.make_tensor_value_info(name, kind, shape)
        for name, shape in inputs.items()
    ]
    made = helper.make_graph(
        nodes,
        "g",
        given,
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [value if isinstance(value, TensorProto) else tensor(name, value) for name, value in constants.items()],
    )
    # the IR version of the opset's time; ONNX Runtime refuses newer ones than it knows
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **extra)
    inferred = onnx.shape_inference.infer_shapes(model).graph.output
    del model.graph.output[:]
    model.graph.output.extend(inferred)
    onnx.save(model, str(path))
    return path


def run(path, **feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [
        torch.from_numpy(np.asarray(output))
        for output in session.run(None, {name: np.asarray(array) for name, array in feed.items()})
    ]


def ops(path):
    """How often each operator is in the main graph."""
    counts = {}
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def truncated(matrix, rank):
    """The best approximation of `rank`, by LAPACK's SVD in float64."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).astype(matrix.dtype)

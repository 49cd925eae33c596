"""Writing a network in the form that something else runs: one file per target, and here the choice between them."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from lrconvert.checkpoints import Header
from lrconvert.exporters import onnx, pt2
from lrconvert.exporters.check import Checked
from lrconvert.inputs import Inputs

__all__ = ["GRAPHS", "Checked"]

# Targets that hold the network's graph, and so need its model: (model in eval mode, what it is called with,
# path that does not exist yet, header, tolerance) to what was checked.
GRAPHS: dict[str, Callable[[nn.Module, Inputs, Path, Header, float], Checked]] = {
    "onnx": onnx.write_onnx,
    "pt2": pt2.write_pt2,
}

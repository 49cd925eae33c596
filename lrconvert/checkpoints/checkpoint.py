"""What every reader returns and every writer takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lrconvert.checkpoints.header import Header
from lrconvert.checkpoints.quantized import Quantized
from lrconvert.images import ImagePreparation, images_in
from lrconvert.tensors import TensorRef

if TYPE_CHECKING:
    from lrconvert.onnx_graph.graph import Graph  # onnx is imported for those who have a graph


def with_shared(tensors: dict[str, TensorRef], shared: Mapping[str, str]) -> dict[str, TensorRef]:
    """`tensors`, and under their other keys those that are stored once for several."""
    again = {
        key: replace(tensors[original], alias_of=original)
        for key, original in shared.items()
        if original in tensors and key not in tensors
    }
    return tensors | again


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose tensors have not been read yet.

    Attributes:
        path: the file or folder that was asked for.
        format: "safetensors", "torch", "pt2", "folder" or "onnx".
        tensors: key to tensor, in the order of the file.
        header: what lrconvert wrote into it, if lrconvert wrote it.
        notes: what was done to get at the state dict, for the report.
        files: the files that hold the tensors, each with its keys.
        metadata: other entries of a safetensors file's own metadata, to be carried over.
        likely_prefixes: what its writer may have put before every key.
        prefix: what was taken off every key, though it may have been the model's.
        quantized: layers whose weights are codes, by name.
        graph: what computes with the tensors, where the file says it.
    """

    path: Path
    format: str
    tensors: dict[str, TensorRef]
    header: Header | None = None
    notes: tuple[str, ...] = ()
    files: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    likely_prefixes: tuple[str, ...] = ("module.",)
    prefix: str = ""
    quantized: dict[str, Quantized] = field(default_factory=dict)
    graph: "Graph | None" = None

    @property
    def images(self) -> ImagePreparation:
        """How images are to be prepared for the network; nothing is set where neither file nor folder says it."""
        said = self.header.images if self.header is not None else None
        return said or (images_in(self.path) if self.format == "folder" else ImagePreparation())

    @property
    def nbytes(self) -> int:
        """Size on disk of the files that hold the tensors."""
        return sum(file.stat().st_size for file in self.files)

"""What every reader returns and every writer takes."""

from dataclasses import dataclass, field
from pathlib import Path

from lrconvert.checkpoints.header import Header
from lrconvert.tensors import TensorRef


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose tensors have not been read yet.

    Attributes:
        path: the file or folder that was asked for.
        format: "safetensors", "torch" or "folder".
        tensors: key to tensor, in the order of the file.
        header: what lrconvert wrote into it, if lrconvert wrote it.
        notes: what was done to get at the state dict, for the report.
        files: the files that hold the tensors, each with its keys.
        nbytes: size of those files on disk.
    """

    path: Path
    format: str
    tensors: dict[str, TensorRef]
    header: Header | None = None
    notes: tuple[str, ...] = ()
    files: dict[Path, tuple[str, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size on disk of the files that hold the tensors."""
        return sum(file.stat().st_size for file in self.files)

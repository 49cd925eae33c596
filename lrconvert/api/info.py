"""`info`: what a file says about itself, without reading its tensors."""

from pathlib import Path

from lrconvert.checkpoints import Checkpoint, open_checkpoint
from lrconvert.checkpoints.hf_config import is_transformers
from lrconvert.checkpoints.quantized import describe
from lrconvert.report.decisions import layer_decisions
from lrconvert.report.record import InfoRecord
from lrconvert.tensors import count_parameters

FOR_TRANSFORMERS = "from_pretrained of transformers loads it after `import lrconvert`, and refuses it without"


def info(source: str | Path | Checkpoint) -> InfoRecord:
    """Describe a checkpoint: its format, its size and, if lrconvert wrote it, its plan.

    Args:
        source: path of a checkpoint, or an open one.

    Raises:
        CheckpointError: the file cannot be read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    quantized = (describe("quantized", checkpoint.quantized),) if checkpoint.quantized else ()
    header, plan = checkpoint.header, checkpoint.header.plan if checkpoint.header else None
    # A file alone cannot tell parameters from buffers; the header knows how many there were.
    known = header.parameters if header else None
    num_params = count_parameters(checkpoint.tensors) if known is None else known - (plan.saved_params if plan else 0)
    dense: dict[str, int] = {}
    for layer in plan.layers if plan else ():
        if layer.rank is None:
            dense[layer.reason] = dense.get(layer.reason, 0) + 1
    rows = layer_decisions(plan) if plan else ()
    by_transformers = plan is not None and checkpoint.path.is_dir() and is_transformers(checkpoint.path)
    return InfoRecord(
        source=str(checkpoint.path),
        format=checkpoint.format,
        notes=(
            *checkpoint.notes,
            *quantized,
            *(header.notes if header else ()),
            *([FOR_TRANSFORMERS] if by_transformers else []),
        ),
        nbytes=checkpoint.nbytes,
        num_tensors=len(checkpoint.tensors),
        num_params=num_params,
        dtypes=tuple(sorted({str(ref.dtype).removeprefix("torch.") for ref in checkpoint.tensors.values()})),
        written_by=header.written_by if header else None,
        model=header.model if header else None,
        input_shape=header.input_shape if header else None,
        rule=plan.rule if plan else None,
        num_params_dense=header.parameters if header and plan else None,
        macs_dense=header.macs if header and plan else None,
        low_rank=tuple(row for row in rows if row.rank is not None),
        dense=dense,
    )

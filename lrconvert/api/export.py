"""`export`: a checkpoint as ONNX, torch.export archive, safetensors, dense again, or with factors of another kind."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lrconvert.analysis import Progress
from lrconvert.api.common import header_for, resolve_device
from lrconvert.checkpoints import Checkpoint, check_output, open_checkpoint, write_checkpoint
from lrconvert.checkpoints.atomic import atomic_path, check_writable
from lrconvert.errors import ModelError, UnknownNameError, UsageError, VerificationError
from lrconvert.exporters import GRAPHS, write_model
from lrconvert.factorization import changing_form, merging
from lrconvert.inputs import shape_of
from lrconvert.loading import load
from lrconvert.network import Network, open_network
from lrconvert.plan import LayerPlan, Plan
from lrconvert.report.record import ExportRecord
from lrconvert.rewrite import layout_of, moving
from lrconvert.tensors import converted, shapes_of
from lrconvert.views import can_pivot

if TYPE_CHECKING:
    from lrconvert.onnx_graph.graph import Graph

TENSORS = ("safetensors", "dense", "pivoted", "plain")
FORMATS = (*GRAPHS, *TENSORS)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
TOLERANCE = 1e-4


def export(
    source: str | Path | Checkpoint,
    output: str | Path,
    format: str,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> ExportRecord:
    """Write a checkpoint in another form, and check it before it is kept.

    Args:
        source: path of a checkpoint, dense or factorized, or an open one.
        output: what to write.
        format: "onnx" or "pt2", the graph with its weights; "safetensors", the same tensors. In the format that
            `output` says: "dense", the factors multiplied out; "pivoted", the same products from fewer numbers, to run
            and not to train (see `lrconvert.layers.pivots`); "plain", pivoted factors as plain ones, to train again.
        model, model_args, input_shape: the architecture, where the file does not name it; graphs need it.
        dtype: "float32", "float16" or "bfloat16", for all floating-point weights; as they are if None.
        tolerance: largest relative difference between a graph's outputs and the model's, or of a layer's in another
            form, where rounding does not cause more.
        overwrite: replace an existing output.
        device: where factors are multiplied out.
        progress: see `analyze`.

    Raises:
        ModelError: a graph was asked for and the architecture or its input shape is not known.
        WeightError: a weight is too large for `dtype`.
        VerificationError: the graph computes something else than the model, or a layer than before; nothing is written.
    """
    if format not in FORMATS:
        raise UnknownNameError("export format", format, FORMATS)
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    wanted = DTYPES[dtype] if dtype is not None else None
    path = Path(output)
    check_writable(path, overwrite)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if checkpoint.graph is not None and format != "dense":
        raise UsageError(
            f"{checkpoint.path} is a graph already: it is exported as dense only, with its factors multiplied out"
        )
    if checkpoint.graph is not None and wanted is not None:
        raise UsageError(
            f"{checkpoint.path} is a graph, whose numbers are not converted: export the model that it came from"
        )
    if format in GRAPHS:
        return _export_graph(checkpoint, path, format, model, model_args, input_shape, wanted, tolerance, overwrite)
    return _export_tensors(checkpoint, path, format, wanted, tolerance, overwrite, device, progress)


def _export_graph(
    checkpoint: Checkpoint,
    path: Path,
    format: str,
    model: str | None,
    model_args: Mapping[str, Any] | None,
    input_shape: tuple[int, ...] | None,
    dtype: torch.dtype | None,
    tolerance: float,
    overwrite: bool,
) -> ExportRecord:
    # torch's exporter fails on a recurrent layer whose weights are partly parameters with gradients, partly products.
    loaded = load(checkpoint, model, model_args=model_args).requires_grad_(False)
    if dtype is not None:
        for key, tensor in loaded.state_dict().items():
            converted(tensor, dtype, key)
        loaded = loaded.to(dtype)
    network = open_network(checkpoint, model, model_args, input_shape)
    if network.inputs is None:
        raise ModelError(f"{checkpoint.path}: the shape of its input is not known; add --input-shape 3,224,224")
    header = header_for(network, checkpoint.header.plan if checkpoint.header else None)
    as_graph = network.architecture.as_graph if network.architecture else nullcontext
    with atomic_path(path, overwrite) as temporary, as_graph(loaded):
        checked, note = write_model(format, loaded, network.inputs, temporary, header, tolerance)
        nbytes = temporary.stat().st_size
    return ExportRecord(
        source=str(checkpoint.path),
        output=str(path),
        format=format,
        nbytes=nbytes,
        checked_with=checked.runner,
        batch_sizes=checked.batch_sizes,
        lengths=checked.lengths,
        difference=checked.difference,
        opset=checked.opset,
        notes=() if note is None else (note,),
    )


def _export_tensors(
    checkpoint: Checkpoint,
    path: Path,
    format: str,
    dtype: torch.dtype | None,
    tolerance: float,
    overwrite: bool,
    device: str,
    progress: Progress | None,
) -> ExportRecord:
    where = resolve_device(device)
    network = open_network(checkpoint)
    if checkpoint.graph is not None:
        return _merge_graph(network, checkpoint.graph, path, format, tolerance, overwrite, where, progress)
    if format == "safetensors" and path.suffix not in (".safetensors", ""):
        raise UsageError(f"{path}: the format is safetensors, so end the output in .safetensors")
    plan = checkpoint.header.plan if checkpoint.header else None
    checked_with = "read back"
    if format == "dense" and plan is not None:
        steps, plan = merging(network.tensors, plan, where), None
    elif format in ("pivoted", "plain"):
        if plan is None:
            raise UsageError(f"{network.name} is dense, it has no factors: factorize it first")
        plan, changed = _in_other_form(plan, format == "pivoted", network.name)
        checked_with = f"products of {len(changed)} layers on random inputs, and read back"
        steps = changing_form(network.tensors, changed, tolerance, where)
    else:
        steps = [moving(key, ref, key) for key, ref in network.tensors.items()]
    write_checkpoint(
        path,
        steps,
        header_for(network, plan),
        checkpoint,
        dtype=dtype,
        overwrite=overwrite,
        device=where,
        progress=progress("writing", len(steps)) if progress else None,
    )
    written = open_checkpoint(path)
    announced = {key: shape for key, (shape, _) in layout_of(steps).items()}
    if shapes_of(written.tensors) != announced:
        raise VerificationError(f"{path}: read back, its tensors are not the ones that were written")
    return ExportRecord(
        source=str(checkpoint.path), output=str(path), format=format, nbytes=written.nbytes, checked_with=checked_with
    )


def _in_other_form(plan: Plan, pivoted: bool, name: str) -> tuple[Plan, list[tuple[LayerPlan, LayerPlan]]]:
    """`plan` with every first factor pivoted that can be, or none, and the layers that changes: before, after."""

    def after(layer: LayerPlan) -> LayerPlan:
        can = layer.rank is not None and not layer.norm and can_pivot(layer.layer)
        return layer.model_copy(update={"pivoted": pivoted}) if can else layer

    layers = tuple(after(layer) for layer in plan.layers)
    changed = [(old, new) for old, new in zip(plan.layers, layers, strict=True) if new != old]
    if not changed and any(layer.pivoted for layer in layers):
        raise UsageError(f"{name}: its factors are pivoted already")
    if not changed and pivoted:
        raise UsageError(
            f"{name}: no factors to pivot: those of linear layers, attention and convolutions of kernel 1 can be, with "
            "no BatchNorm between them"
        )
    if not changed:
        raise UsageError(f"{name}: no factors are pivoted: all are plain ones")
    # Sizes and times were those of the other form.
    target = None if plan.target is None or plan.target.kind.endswith("_ratio") else plan.target
    return plan.model_copy(update={"layers": layers, "latency": None, "target": target}), changed


def _merge_graph(
    network: Network,
    graph: "Graph",
    path: Path,
    format: str,
    tolerance: float,
    overwrite: bool,
    device: torch.device,
    progress: Progress | None,
) -> ExportRecord:
    from lrconvert.checkpoints.onnx_file import write_graph

    header = network.checkpoint.header if network.checkpoint else None
    plan = header.plan if header else None
    if plan is None:
        raise UsageError(f"{network.name} is dense already: it holds no plan of lrconvert's")
    check_output(path, network.checkpoint, overwrite)
    outcome = write_graph(
        path,
        graph,
        plan,
        header_for(network, None),
        merge=True,
        input_shape=shape_of(network.inputs),
        tolerance=tolerance,
        overwrite=overwrite,
        device=device,
        progress=progress("merging", len(plan.low_rank)) if progress else None,
    )
    return ExportRecord(
        source=network.name,
        output=str(path),
        format=format,
        nbytes=open_checkpoint(path).nbytes,
        checked_with=outcome.note,
        difference=outcome.difference,
        opset=graph.opset,
    )

"""ONNX graphs: read with weights as tensors, written with factors in their place, and run before they are kept."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lrconvert.checkpoints.atomic import atomic_path
from lrconvert.checkpoints.checkpoint import Checkpoint
from lrconvert.checkpoints.header import KEY, Header, read_header
from lrconvert.errors import OutputExistsError
from lrconvert.onnx_graph.check import TOLERANCE, Outcome, compare_runs
from lrconvert.onnx_graph.graph import Draft, Graph, set_note
from lrconvert.onnx_graph.save import data_path, save
from lrconvert.plan import Plan
from lrconvert.response import Response
from lrconvert.rewrite import CPU

Progress = Callable[[], None] | None


def read_onnx(path: Path) -> Checkpoint:
    """Open an ONNX graph; data beside it is not read.

    Raises:
        CheckpointError: it is no ONNX graph, a damaged one, or its external data is missing.
    """
    graph = Graph(path)
    tensors = graph.tensors()
    files = {file: tuple(tensors) if file == path else () for file in graph.files}
    header = read_header(graph.metadata, str(path))
    return Checkpoint(path, "onnx", tensors, header, graph.notes, files, graph=graph)


def write_graph(
    path: Path,
    source: Graph,
    plan: Plan,
    header: Header,
    *,
    merge: bool = False,
    input_shape: tuple[int, ...] | None = None,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    device: torch.device = CPU,
    responses: Mapping[str, Response] | None = None,
    progress: Progress = None,
) -> Outcome:
    """Write `source` factorized by `plan`, or with `merge` its factors multiplied out, and run it before it is kept.

    A factorized graph is run beside `source` with merged weights, a merged one beside `source` itself. `responses` are
    those of the layers that the plan wants data-aware.

    Raises:
        PlanError: the plan is not one for this graph, or the graph does not hold its factors.
        OutputExistsError: the output exists and `overwrite` is False.
        VerificationError: the two compute different things; nothing is kept.
    """
    with atomic_path(path, overwrite) as temporary:
        draft = source.merged(plan) if merge else source.factorized(plan, device, responses)
        _write(draft, temporary, header, path, overwrite, device, progress)
        written = Graph(temporary)
        if merge:
            return compare_runs(written, source, input_shape, tolerance, str(path))
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            reference = Path(folder) / "merged.onnx"
            save(source.with_products(plan, written), reference)
            return compare_runs(Graph(reference), written, input_shape, tolerance, str(path))


def _write(
    draft: Draft, path: Path, header: Header, final: Path, overwrite: bool, device: torch.device, progress: Progress
) -> None:
    set_note(draft.model, KEY, header.model_dump_json(exclude_defaults=True))
    save(draft, path, device, progress)
    beside = data_path(final)
    if data_path(path).exists() and beside.exists() and not overwrite:
        raise OutputExistsError(f"{beside} exists; choose another output or add --overwrite")

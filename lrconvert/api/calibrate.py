"""`calibrate`: what a network's weights meet on a few examples, for data-aware factorization."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lrconvert import calibration as numbers
from lrconvert.analysis import Progress
from lrconvert.api.common import resolve_device
from lrconvert.calibration import Calibration
from lrconvert.errors import UsageError
from lrconvert.heads import Head, sentence_head
from lrconvert.layers import Layer
from lrconvert.loading import model_of
from lrconvert.network import Network, Source, open_network
from lrconvert.samples import Call, Samples, read_samples
from lrconvert.sensitivity import measured_curves
from lrconvert.views import split

if TYPE_CHECKING:
    from lrconvert.onnx_graph.graph import Graph

# Batches that sensitivity is measured on: three passes over them for every layer.
_MEASURED_CALLS = 2
# What every weight of a graph is multiplied by is in memory at once, for all examples of a call.
_OF_GRAPHS = 8
# A single vector for all tokens of a text: one projection of it is too noisy (benchmarks/sentence_embeddings.py).
_OF_EMBEDDINGS = 4


def calibrate(
    source: Source,
    data: str | Path | Samples | Iterable[Call],
    *,
    seed: int = 0,
    splits: Mapping[str, int] | None = None,
    two_sided: bool = True,
    projections: int | None = None,
    measure: bool | None = None,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **reading: Any,
) -> Calibration:
    """Run a dense network on examples, for `make_plan(…, calibration=…)` and `factorize(…, calibration=…)`.

    What counts of the output is its first tensor, or, for a folder of sentence-transformers, the embedding of a text.

    Args:
        source: a checkpoint's path or a live model.
        data: examples without labels: what `lrconvert.samples.read_samples` reads, what it returns, or calls of the
            model.
        seed: of the choice of examples, and of the projections.
        splits: of layers that will be factorized in parts, see `make_plan`.
        two_sided: differentiate too, so that errors of all layers are in one unit; one backward pass a batch. A graph
            has no gradients, and is calibrated on what its weights are multiplied by alone.
        projections: backward passes a batch; more of them, less noise in what is known of the gradients. None for one,
            and for four where the output is one embedding a text.
        measure: also measure what low ranks of each layer alone do to the output, for the allocator "sensitivity"; None
            for graphs alone, which have nothing else that brings the errors of their layers into one unit.
        model, model_args, input_shape, device, progress: see `analyze`.
        **reading: how many examples, and how they are prepared: what else `read_samples` takes (count, batch_size,
            data_dir, …).

    Raises:
        UsageError: the network cannot be called with this data.
        LrconvertError: the data cannot be read.
    """
    network = open_network(source, model, model_args, input_shape)
    graph = network.checkpoint.graph if network.checkpoint else None
    if isinstance(data, str | Path):
        samples = read_samples(str(data), network, seed=seed, **(_batch_of(graph) if graph else {}) | reading)
    elif reading:
        raise UsageError(f"{', '.join(reading)}: calls are taken as they are")
    else:
        samples = data if isinstance(data, Samples) else _samples(tuple(data))
    if graph is not None:
        samples = _whole_batches(samples, graph)
    network = replace(network, layers=split(network.layers, tuple((splits or {}).items())))
    live, layers, head = _of_graph(graph, network) if graph else _of_model(network)
    advance = progress("calibrating", len(samples.calls)) if progress else None
    found = numbers.calibrate(
        live,
        layers,
        samples.calls,
        two_sided=two_sided and graph is None,
        projections=projections or (_OF_EMBEDDINGS if head else 1),
        head=head,
        device=resolve_device(device),
        seed=seed,
        progress=advance,
    )
    if not found.responses:
        raise UsageError(f"calibration on {samples.notes[0]} met no weight that can be factorized")
    found = replace(found, notes=samples.notes)
    if graph is not None if measure is None else measure:
        layers = [layer for layer in layers if layer.name in found.responses and not layer.dense_reason]
        advance = progress("measuring sensitivity", len(layers)) if progress else None
        calls = samples.calls[:: max(1, len(samples.calls) // _MEASURED_CALLS)][:_MEASURED_CALLS]
        live = live if graph is None else _adjustable(graph, network)
        found = replace(found, measured=measured_curves(live, layers, found, calls, head, advance))
    return found


def _of_model(network: Network) -> tuple[nn.Module, Sequence[Layer], Head | None]:
    """(the model with its weights, its layers, what of its output counts)."""
    folder = network.checkpoint.path if network.checkpoint is not None else None
    head = sentence_head(folder) if folder is not None and folder.is_dir() else None
    return model_of(network), network.layers, head


def _of_graph(graph: "Graph", network: Network) -> tuple[nn.Module, Sequence[Layer], None]:
    """(a graph as a module, its layers by the names they have in that)."""
    from lrconvert.onnx_graph.module import GraphProducts

    live = GraphProducts(graph, network.layers)
    return live, live.layers, None


def _adjustable(graph: "Graph", network: Network) -> nn.Module:
    """The same with weights that can be changed; it runs slower."""
    from lrconvert.onnx_graph.module import GraphModule

    return GraphModule(graph, network.layers)


def _batch_of(graph: "Graph") -> dict[str, int]:
    """How many examples of a call `graph` takes, for `read_samples`."""
    from lrconvert.onnx_graph.inputs import fixed_batch

    return {"batch_size": fixed_batch(graph) or _OF_GRAPHS}


def _whole_batches(samples: Samples, graph: "Graph") -> Samples:
    """`samples` without a last call that is too small for a graph which takes no other number of examples."""
    from lrconvert.onnx_graph.inputs import fixed_batch

    batch = fixed_batch(graph)
    calls = tuple(call for call in samples.calls if batch in (None, call.size))
    if not calls:
        raise UsageError(f"{graph.path} takes {batch} examples at once: give as many, or a multiple of it")
    return replace(samples, calls=calls)


def _samples(calls: tuple[Call, ...]) -> Samples:
    """`calls` with a note of how many examples they are."""
    odd = next((call for call in calls if not isinstance(call, Call)), None)
    if odd is not None:
        raise UsageError(f"calibration takes lrconvert.samples.Call(args, kwargs, size), not {type(odd).__name__}")
    return Samples(calls, (f"{sum(call.size for call in calls):,} examples",))

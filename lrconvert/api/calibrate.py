"""`calibrate`: what a network's weights meet on a few examples, for data-aware factorization."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lrconvert import calibration as numbers
from lrconvert.analysis import Progress
from lrconvert.api.common import resolve_device
from lrconvert.calibration import Calibration
from lrconvert.errors import UsageError
from lrconvert.heads import Head, sentence_head
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
_GRAPH_BATCH = 8
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

    What counts of the output is its first tensor of real numbers, or, for a folder of sentence-transformers, the
    embedding of a text.

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
        read = partial(read_samples, str(data), network, seed=seed)
        samples = _in_batches(graph, read, reading) if graph else read(**reading)
    elif reading:
        raise UsageError(f"{', '.join(reading)}: calls are taken as they are")
    else:
        samples = data if isinstance(data, Samples) else _samples(tuple(data))
    layers = tuple(split(network.layers, tuple((splits or {}).items())))
    if graph is not None and layers != network.layers:
        raise UsageError(f"{network.name} is a graph, whose weights are not split: leave --split out")
    network = replace(network, layers=layers)
    watched, head = (_of_graph(graph, network), None) if graph else _of_model(network)
    calls = [_named(call, graph) for call in samples.calls] if graph else samples.calls
    found = numbers.calibrate(
        watched,
        network.layers,
        calls,
        two_sided=two_sided and graph is None,
        projections=projections or (_OF_EMBEDDINGS if head else 1),
        head=head,
        device=resolve_device(device),
        seed=seed,
        progress=progress("calibrating", len(calls)) if progress else None,
    )
    if not found.responses:
        raise UsageError(f"calibration on {samples.notes[0]} met no weight that can be factorized")
    found = replace(found, notes=samples.notes)
    if graph is not None if measure is None else measure:
        changed = [layer for layer in layers if layer.name in found.responses and not layer.dense_reason]
        advance = progress("measuring sensitivity", len(changed)) if progress else None
        chosen = calls[:: max(1, len(calls) // _MEASURED_CALLS)][:_MEASURED_CALLS]
        adjustable = _of_graph(graph, network, adjustable=True) if graph else watched
        measured = measured_curves(adjustable, changed, found, chosen, head, advance)
        nothing = () if measured else ("no layer's effect can be measured: outputs stay as they are, or change shape",)
        found = replace(found, measured=measured, notes=(*found.notes, *nothing))
    return found


def _of_model(network: Network) -> tuple[nn.Module, Head | None]:
    """(the model with its weights, what of its output counts)."""
    folder = network.checkpoint.path if network.checkpoint is not None else None
    return model_of(network), sentence_head(folder) if folder is not None and folder.is_dir() else None


def _of_graph(graph: "Graph", network: Network, adjustable: bool = False) -> nn.Module:
    """A graph as a module whose products are seen, or whose weights can be changed."""
    from lrconvert.onnx_graph.module import AdjustableGraph, WatchedGraph

    return (AdjustableGraph if adjustable else WatchedGraph)(graph, network.layers)


def _in_batches(graph: "Graph", read: Callable[..., Samples], reading: Mapping[str, Any]) -> Samples:
    """What `read` makes of its settings `reading`, in calls of as many examples as `graph` takes."""
    from lrconvert.onnx_graph.inputs import fixed_batch

    batch = fixed_batch(graph)
    size = batch or reading.get("batch_size", _GRAPH_BATCH)
    samples = read(**{**reading, "batch_size": size})
    calls = tuple(call for call in samples.calls if batch in (None, call.size))
    if len(calls) == len(samples.calls):
        return samples
    if not calls:
        raise UsageError(f"{graph.path} takes {batch} examples at once: give more than {samples.size}")
    dropped = f"{samples.size - len(calls) * size} left out: the graph takes {batch} at once"
    return replace(samples, calls=calls, notes=(f"{samples.notes[0]}, {dropped}", *samples.notes[1:]))


def _named(call: Call, graph: "Graph") -> Call:
    """`call` with its tensors by the names that `graph` has for them, as masks are known by theirs."""
    from lrconvert.onnx_graph.inputs import inputs_of

    names = [each.name for each in inputs_of(graph)]
    if len(call.args) > len(names):
        return call  # which says so when it runs
    return Call((), dict(zip(names, call.args, strict=False)) | call.kwargs, call.size)


def _samples(calls: tuple[Call, ...]) -> Samples:
    """`calls` with a note of how many examples they are."""
    odd = next((call for call in calls if not isinstance(call, Call)), None)
    if odd is not None:
        raise UsageError(f"calibration takes lrconvert.samples.Call(args, kwargs, size), not {type(odd).__name__}")
    return Samples(calls, (f"{sum(call.size for call in calls):,} examples",))

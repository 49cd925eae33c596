"""`calibrate`: what a network's weights meet on a few examples, for data-aware factorization."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrconvert import calibration as numbers
from lrconvert.analysis import Progress
from lrconvert.api.common import resolve_device
from lrconvert.calibration import Calibration
from lrconvert.errors import UsageError
from lrconvert.heads import sentence_head
from lrconvert.loading import model_of
from lrconvert.network import Source, open_network
from lrconvert.samples import Call, Samples, read_samples
from lrconvert.sensitivity import measured_curves
from lrconvert.views import split

# Batches that sensitivity is measured on: three passes over them for every layer.
_MEASURED_CALLS = 2
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
    measure: bool = False,
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
        two_sided: differentiate too, so that errors of all layers are in one unit; one backward pass a batch.
        projections: backward passes a batch; more of them, less noise in what is known of the gradients. None for one,
            and for four where the output is one embedding a text.
        measure: also measure what low ranks of each layer alone do to the output, for the allocator "sensitivity".
        model, model_args, input_shape, device, progress: see `analyze`.
        **reading: how many examples, and how they are prepared: what else `read_samples` takes (count, batch_size,
            data_dir, …).

    Raises:
        UsageError: the source is a graph, or the network cannot be called with this data.
        LrconvertError: the data cannot be read.
    """
    network = open_network(source, model, model_args, input_shape)
    if network.checkpoint is not None and network.checkpoint.graph is not None:
        raise UsageError(f"{network.name} is a graph, which cannot be calibrated: factorize the model it came from")
    if isinstance(data, str | Path):
        samples = read_samples(str(data), network, seed=seed, **reading)
    elif reading:
        raise UsageError(f"{', '.join(reading)}: calls are taken as they are")
    else:
        samples = data if isinstance(data, Samples) else _samples(tuple(data))
    network = replace(network, layers=split(network.layers, tuple((splits or {}).items())))
    live, where = model_of(network), resolve_device(device)
    folder = network.checkpoint.path if network.checkpoint is not None else None
    head = sentence_head(folder) if folder is not None and folder.is_dir() else None
    advance = progress("calibrating", len(samples.calls)) if progress else None
    found = numbers.calibrate(
        live,
        network.layers,
        samples.calls,
        two_sided=two_sided,
        projections=projections or (_OF_EMBEDDINGS if head else 1),
        head=head,
        device=where,
        seed=seed,
        progress=advance,
    )
    if not found.responses:
        raise UsageError(f"calibration on {samples.notes[0]} met no weight that can be factorized")
    found = replace(found, notes=samples.notes)
    if measure:
        layers = [layer for layer in network.layers if layer.name in found.responses and not layer.dense_reason]
        advance = progress("measuring sensitivity", len(layers)) if progress else None
        calls = samples.calls[:: max(1, len(samples.calls) // _MEASURED_CALLS)][:_MEASURED_CALLS]
        found = replace(found, measured=measured_curves(live, layers, found, calls, head, advance))
    return found


def _samples(calls: tuple[Call, ...]) -> Samples:
    """`calls` with a note of how many examples they are."""
    odd = next((call for call in calls if not isinstance(call, Call)), None)
    if odd is not None:
        raise UsageError(f"calibration takes lrconvert.samples.Call(args, kwargs, size), not {type(odd).__name__}")
    return Samples(calls, (f"{sum(call.size for call in calls):,} examples",))

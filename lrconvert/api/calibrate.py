"""`calibrate`: what a network's weights meet on a few examples, for data-aware factorization."""

from collections.abc import Mapping, Sequence
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
from lrconvert.samples import read_samples
from lrconvert.sensitivity import measured_curves
from lrconvert.views import split

# Batches that sensitivity is measured on: three passes over them for every layer.
_MEASURED_CALLS = 2
# A single vector for all tokens of a text: one projection of it is too noisy (benchmarks/sentence_embeddings.py).
_OF_EMBEDDINGS = 4


def calibrate(
    source: Source,
    data: str,
    *,
    count: int = 256,
    batch_size: int = 32,
    skip: int = 0,
    seed: int = 0,
    splits: Mapping[str, int] | None = None,
    two_sided: bool = True,
    projections: int | None = None,
    measure: bool = False,
    data_dir: str | Path = "data",
    download: bool = True,
    img_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_tokens: int = 128,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Calibration:
    """Run a dense network on examples, for `make_plan(…, calibration=…)` and `factorize(…, calibration=…)`.

    What counts of the output is its first tensor, or, for a folder of sentence-transformers, the embedding of a text.

    Args:
        source: a checkpoint's path or a live model.
        data: where the examples come from, see `lrconvert.samples.read_samples`; labels are not needed.
        count, batch_size, skip, seed, data_dir, download, img_size, mean, std, max_tokens: likewise.
        splits: of layers that will be factorized in parts, see `make_plan`.
        two_sided: differentiate too, so that errors of all layers are in one unit; one backward pass a batch.
        projections: backward passes a batch; more of them, less noise in what is known of the gradients. None for one,
            and for four where the output is one embedding a text.
        measure: also measure what low ranks of each layer alone do to the output, for the allocator "sensitivity".
        model, model_args, input_shape, device, progress: see `analyze`.

    Raises:
        UsageError: the source is a graph, or the network cannot be called with this data.
        LrconvertError: the data cannot be read.
    """
    network = open_network(source, model, model_args, input_shape)
    if network.checkpoint is not None and network.checkpoint.graph is not None:
        raise UsageError(f"{network.name} is a graph, which cannot be calibrated: factorize the model it came from")
    samples = read_samples(
        data,
        network,
        count=count,
        batch_size=batch_size,
        skip=skip,
        seed=seed,
        data_dir=data_dir,
        download=download,
        img_size=img_size,
        mean=mean,
        std=std,
        max_tokens=max_tokens,
    )
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
        raise UsageError(f"calibration on {data} met no weight that can be factorized")
    found = replace(found, notes=samples.notes)
    if measure:
        layers = [layer for layer in network.layers if layer.name in found.responses and not layer.dense_reason]
        advance = progress("measuring sensitivity", len(layers)) if progress else None
        calls = samples.calls[:: max(1, len(samples.calls) // _MEASURED_CALLS)][:_MEASURED_CALLS]
        found = replace(found, measured=measured_curves(live, layers, found, calls, head, advance))
    return found

"""`compare`: two checkpoints side by side, weights merged, outputs and latency measured where models are known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lrconvert.checkpoints import Checkpoint, open_checkpoint
from lrconvert.errors import CheckpointError
from lrconvert.factorization import merged_weight, replacements
from lrconvert.inputs import examples, shape_of
from lrconvert.loading import load
from lrconvert.network import Network, open_network
from lrconvert.outputs import tensors_in
from lrconvert.plan import LayerPlan
from lrconvert.report.record import CompareRecord, LayerDifference, Side
from lrconvert.tensors import relative_difference
from lrconvert.timer import Latency, latencies


def compare(
    first: str | Path,
    second: str | Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    batch_size: int = 1,
) -> CompareRecord:
    """Put two checkpoints side by side.

    Args:
        first, second: checkpoints, dense or factorized; usually a network before and after.
        model, model_args, input_shape: the architecture of both, where the files do not name it. With it, or for two
            graphs, outputs are compared on one random batch, and latency is measured in turn on this machine's CPU.
        batch_size: of that batch.

    Raises:
        CheckpointError: a file cannot be read, or the two have no weight in common.
    """
    files = open_checkpoint(first), open_checkpoint(second)
    # A file that lrconvert made from the other one may say what holds for both.
    headers = [file.header for file in files if file.header]
    input_shape = input_shape or next((each.input_shape for each in headers if each.input_shape), None)
    modules = [file for file in files if file.graph is None]
    if model is None and modules:
        named = [each for each in headers if each.model]
        if named and ".py:" not in str(named[0].model):
            model, model_args = named[0].model, named[0].model_args
    # A graph beside a module needs no model, but where there are only graphs, nothing does.
    models = [(model, model_args) if file in modules or not modules else (None, None) for file in files]
    networks = [open_network(file, *of, input_shape) for file, of in zip(files, models, strict=True)]
    # As the model has their tensors, where there is one.
    files = networks[0].checkpoint or files[0], networks[1].checkpoint or files[1]
    keys = [_dense_keys(file) for file in files]
    shared = [key for key in keys[0] if key in keys[1]]
    if not shared:
        raise CheckpointError(f"{first} and {second} have no tensor in common")
    sides = [_side(network) for network in networks]
    difference, note = None, None
    if all(network.module is not None and network.trace is not None for network in networks):
        difference, note, sides = _run_both(files, networks, sides, model, model_args, batch_size)
    graphs = [file.graph for file in files]
    if graphs[0] is not None and graphs[1] is not None:
        from lrconvert.onnx_graph.check import side_by_side

        if (ran := side_by_side(graphs[0], graphs[1], shape_of(networks[0].inputs))) is not None:
            difference, note, sides = ran.difference, ran.note, _timed(sides, ran.latencies)
    return CompareRecord(
        first=sides[0],
        second=sides[1],
        output_difference=difference,
        latency_note=note,
        only_first=tuple(key for key in keys[0] if key not in keys[1]),
        only_second=tuple(key for key in keys[1] if key not in keys[0]),
        layers=tuple(_layer_differences(files, keys, shared)),
    )


def _dense_keys(checkpoint: Checkpoint) -> dict[str, LayerPlan | None]:
    """Key of every tensor of the merged network, to the decision for it where it is factorized."""
    plan = checkpoint.header.plan if checkpoint.header else None
    if checkpoint.graph is not None:
        return dict(checkpoint.graph.dense_keys(plan))
    factorized = {layer.key("u"): layer for layer in plan.low_rank} if plan else {}
    renamed = {layer.key("v", "bias"): layer.bias_key for layer in plan.low_rank} if plan else {}
    skipped = {key for layer in factorized.values() for key in replacements(layer)}
    keys: dict[str, LayerPlan | None] = {}
    for key in checkpoint.tensors:
        if key in factorized:
            keys[factorized[key].weight] = factorized[key]
        elif key not in skipped:
            keys[renamed.get(key, key)] = None
    return keys


def _layer_differences(
    files: tuple[Checkpoint, Checkpoint], keys: list[dict[str, LayerPlan | None]], shared: list[str]
) -> list[LayerDifference]:
    rows = []
    for key in shared:
        weights = [_weight(file, key, where[key]) for file, where in zip(files, keys, strict=True)]
        if weights[0] is None or weights[1] is None or weights[0].dim() < 2 or weights[0].shape != weights[1].shape:
            continue
        decisions = keys[0][key], keys[1][key]
        rows.append(
            LayerDifference(
                name=key.removesuffix(".weight"),
                shape=tuple(weights[0].shape),
                rank=(decisions[0].rank if decisions[0] else None, decisions[1].rank if decisions[1] else None),
                difference=relative_difference(weights[1], weights[0]),
            )
        )
    return rows


def _weight(checkpoint: Checkpoint, key: str, decision: LayerPlan | None) -> torch.Tensor | None:
    """A merged floating-point tensor, or None for one of another type."""
    if decision is None:
        ref = checkpoint.tensors.get(key)
        return ref.read() if ref is not None and ref.dtype.is_floating_point else None
    if checkpoint.graph is not None:
        return checkpoint.graph.merged_weight(decision)
    return merged_weight(checkpoint.tensors, decision)


def _side(network: Network) -> Side:
    assert network.checkpoint is not None
    return Side(
        source=network.name,
        model=network.architecture.name if network.architecture else None,
        num_params=network.num_params,
        macs=network.trace.macs if network.trace else None,
        nbytes=network.checkpoint.nbytes,
    )


def _run_both(
    files: tuple[Checkpoint, Checkpoint],
    networks: list[Network],
    sides: list[Side],
    model: str | None,
    model_args: Mapping[str, Any] | None,
    batch_size: int,
) -> tuple[float | None, str, list[Side]]:
    """(difference of outputs, what latency was measured on, sides with their latency)."""
    inputs = networks[0].inputs
    assert inputs is not None
    arguments, names = examples(inputs, batch_size, torch.float32)
    models = [load(file, model, model_args=model_args).float() for file in files]
    with torch.no_grad():
        outputs = [torch.cat([out.flatten() for out in tensors_in(model(*arguments, **names))]) for model in models]
        calls = [lambda model=model: model(*arguments, **names) for model in models]
        times = latencies(calls)
    note = f"CPU, {torch.get_num_threads()} threads, float32, batch {batch_size}, median of {times[0].n}, in turn"
    same = outputs[0].shape == outputs[1].shape
    return relative_difference(outputs[1], outputs[0]) if same else None, note, _timed(sides, times)


def _timed(sides: list[Side], times: Sequence[Latency]) -> list[Side]:
    """The sides with their latency."""
    return [
        side.model_copy(update={"latency_ms": time.median_ms, "latency_range_ms": (time.low_ms, time.high_ms)})
        for side, time in zip(sides, times, strict=True)
    ]

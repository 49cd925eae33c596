"""`analyze`: spectra of every layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lrconvert.analysis import Analysis, Progress, analyze_layers
from lrconvert.api.common import resolve_device
from lrconvert.layers import Layer
from lrconvert.network import NOT_REAL, Source, open_network, refuse_quantized
from lrconvert.patterns import check_patterns, first_match
from lrconvert.report.record import AnalyzeRecord, LayerSpectrum
from lrconvert.spectrum import Spectrum

PROFILE_POINTS = 24


def analyze(
    source: Source,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    init: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Analysis:
    """Singular values of every weight of two or more dimensions.

    Args:
        source: a checkpoint's path, or a live model.
        model: architecture of the file, "torchvision/resnet50" or "file.py:factory"; settles kinds, order and MACs.
        model_args: its keyword arguments.
        input_shape: shape of one input without the batch, where the architecture does not say.
        include: only layers that match one of these patterns.
        exclude: not the layers that match one of these.
        init: checkpoint of the same network at initialisation; ξ is then measured, not the closed form.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: called with (what, number of steps); returns a function to call after each.

    Returns:
        The network and `spectra`, by layer name.
    """
    network = open_network(source, model, model_args, input_shape)
    names = [layer.name for layer in network.layers]
    check_patterns(include, names, "--include")
    check_patterns(exclude, names, "--exclude")
    layers = [
        layer
        for layer in network.layers
        if (not include or first_match(include, layer.name)) and not first_match(exclude, layer.name)
    ]
    refuse_quantized(network, include, exclude)
    layers = [layer for layer in layers if layer.kind not in NOT_REAL]
    initial = open_network(init) if init is not None else None
    return analyze_layers(network, layers, initial, resolve_device(device), progress)


def analyze_record(analysis: Analysis) -> AnalyzeRecord:
    """The report of an analysis, one row for each layer that has a spectrum."""
    network = analysis.network
    return AnalyzeRecord(
        source=network.name,
        model=network.architecture.name if network.architecture else None,
        order=network.order,
        num_params=network.num_params,
        macs=network.trace.macs if network.trace else None,
        nbytes=network.checkpoint.nbytes if network.checkpoint else None,
        notes=network.notes,
        layers=tuple(
            _row(analysis, layer, analysis.spectra[layer.name])
            for layer in network.layers
            if layer.name in analysis.spectra
        ),
    )


def _row(analysis: Analysis, layer: Layer, spectrum: Spectrum) -> LayerSpectrum:
    trace = analysis.network.trace
    positions = trace.positions.get(layer.owner) if trace else None
    stable, xi = float(spectrum.stable_rank().max()), analysis.xi(layer)
    return LayerSpectrum(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        groups=layer.groups,
        evidence=layer.evidence,
        num_params=layer.num_params,
        macs=None if positions is None else layer.macs(positions),
        full_rank=layer.full_rank,
        break_even_rank=layer.break_even_rank,
        stable_rank=stable,
        xi=xi,
        xi_source="measured" if layer.name in analysis.initial else "closed form",
        scaled_stable_rank=xi * stable,
        accumulative_rank_80=spectrum.accumulative_rank(0.8),
        energy_rank_90=spectrum.energy_rank(0.9),
        sigma_max=float(spectrum.values[:, 0].max()),
        frobenius_norm=float(spectrum.energy.sum().sqrt()),
        profile=_profile(spectrum),
        dense_reason=layer.dense_reason,
    )


def _profile(spectrum: Spectrum) -> tuple[float, ...]:
    """σ/σ_max of the first group at evenly spaced indices."""
    values = spectrum.values[0]
    at = torch.linspace(0, len(values) - 1, min(PROFILE_POINTS, len(values))).round().long()
    largest = float(values[0])
    return tuple(float(value) / largest if largest else 0.0 for value in values[at])

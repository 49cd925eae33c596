"""What a low rank of one layer really does to the output of the network: measured, layer by layer.

What counts is the first output, or, of a layer that does not move it, the next one that it does: networks may have
several heads. The errors of those are brought into the unit of the first by the outputs' norms.

The predicted curve of a layer, the tail of its response's spectrum, is right in shape where errors are small. A few
forward passes with one approximated weight say how far off it is: AIMET and ASVD (Yuan et al. 2023,
https://arxiv.org/abs/2312.05821) rank layers by such measurements alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.allocation import FloatArray
from lrconvert.calibration import Calibration, energy_of, outputs_of
from lrconvert.heads import Head
from lrconvert.inputs import Call
from lrconvert.layers import Layer
from lrconvert.modes import at_rest
from lrconvert.response import Response

# Ranks that are measured, as shares of the break-even rank.
_PROBES = (0.25, 0.5, 0.75)


def measured_curves(
    model: nn.Module,
    layers: Sequence[Layer],
    calibration: Calibration,
    calls: Sequence[Call],
    head: Head | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, FloatArray]:
    """By layer name, the mean squared error of the network's output for one example, by the rank of that layer alone.

    Layers are missing that move no output, that change the shape of every one, as boxes that are found may, or whose
    weight `model` does not have as a parameter.

    Args:
        model: dense, with its weights; left as it was.
        layers: those to measure; those without a response are left out.
        calibration: what their approximations are made with.
        calls: a few batches; every layer takes three passes over them.
        head: what of the output counts, as for `calibrate`.
        progress: called after each layer.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with at_rest(model), torch.no_grad():
        wanted = [outputs_of(model, call, head) for call in calls]
        energies = [sum(map(energy_of, output)) for output in zip(*wanted, strict=True)]
        examples = sum(call.size for call in calls)
        curves, predictions = {}, calibration.curves()
        for layer in layers:
            if layer.name not in predictions or layer.weight not in parameters:
                continue
            predicted, response = predictions[layer.name], calibration.responses[layer.name]
            ranks = sorted({max(1, round(share * layer.break_even_rank)) for share in _PROBES})
            found = []
            for rank in ranks:
                with _approximated(parameters, layer, response, rank):
                    found.append(_squared([outputs_of(model, call, head) for call in calls], wanted))
            errors = _of_first_moved(found, energies)
            if errors is not None:
                mean = [error / examples for error in errors]
                curves[layer.name] = _scaled(predicted, ranks, mean, energies[0] / examples)
            if progress:
                progress()
    return curves


def _squared(found: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> list[float]:
    """By output, its squared error in all calls, where what is wanted is finite; NaN where shapes differ."""

    def squared(pair: tuple[Tensor, Tensor]) -> float:
        got, want = pair
        if got.shape != want.shape:
            return math.nan
        return energy_of(torch.where(want.isfinite(), torch.nan_to_num(got, 0.0, 0.0, 0.0) - want, 0.0))

    pairs = (zip(*both, strict=True) for both in zip(found, wanted, strict=True))
    return [sum(map(squared, output)) for output in zip(*pairs, strict=True)]


def _of_first_moved(found: Sequence[Sequence[float]], energies: Sequence[float]) -> list[float] | None:
    """The errors, in the unit of the first output, of the first output that they are known of and not 0 of.

    Args:
        found: by rank and output, the squared error.
        energies: by output, its squared norm.
    """
    for errors, energy in zip(zip(*found, strict=True), energies, strict=True):
        if all(math.isfinite(error) for error in errors) and any(errors) and energy:
            return [error * (energies[0] / energy if energies[0] else 1.0) for error in errors]
    return None


def _scaled(predicted: FloatArray, ranks: Sequence[int], errors: Sequence[float], whole: float) -> FloatArray:
    """`predicted`, times measured / predicted at `ranks`, whose logarithm is interpolated between them.

    Where nothing is lost at any of `ranks`, anything lost below is taken for `whole`, the output's mean ‖y‖².
    """
    at = np.array(ranks)
    known = (predicted[at] > 0) & (np.array(errors) > 0)
    if not known.any():
        return np.where(predicted > 0, whole, 0.0)
    ratios = np.log(np.array(errors)[known] / predicted[at][known])
    scaled: FloatArray = predicted * np.exp(np.interp(np.arange(len(predicted)), at[known], ratios))
    return np.minimum.accumulate(scaled)


@contextmanager
def _approximated(
    parameters: Mapping[str, nn.Parameter], layer: Layer, response: Response, rank: int
) -> Iterator[None]:
    """The best weight of `rank` in the place of the layer's, and the bias that goes with it."""
    weight, bias = parameters[layer.weight], parameters.get(layer.bias_key)
    kept = [(each, each.data) for each in (weight, bias) if each is not None]
    u, v, shift = response.factors(layer.layout.matrices(weight.data, layer.groups), rank)
    try:
        weight.data = layer.layout.weight(v @ u, layer.shape).contiguous()
        if bias is not None:
            bias.data = (bias.data.double() + shift.flatten().to(bias.device)).to(bias.dtype)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data

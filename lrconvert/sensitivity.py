"""What a low rank of one layer really does to the output of the network: measured, layer by layer.

The predicted curve of a layer, the tail of its response's spectrum, is right in shape where errors are small. A few
forward passes with one approximated weight say how far off it is: AIMET and ASVD (Yuan et al. 2023,
https://arxiv.org/abs/2312.05821) rank layers by such measurements alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lrconvert.allocation import FloatArray
from lrconvert.calibration import Calibration, output_of
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
        wanted = [output_of(model, call, head) for call in calls]
        examples = sum(call.size for call in calls)
        curves, predictions = {}, calibration.curves()
        for layer in layers:
            if layer.name not in predictions:
                continue
            predicted, response = predictions[layer.name], calibration.responses[layer.name]
            ranks = sorted({max(1, round(share * layer.break_even_rank)) for share in _PROBES})
            errors = []
            for rank in ranks:
                with _approximated(parameters, layer, response, rank):
                    total = sum(
                        _squared(output_of(model, call, head), want) for call, want in zip(calls, wanted, strict=True)
                    )
                errors.append(total / examples)
            curves[layer.name] = _scaled(predicted, ranks, errors)
            if progress:
                progress()
    return curves


def _squared(one: Tensor, other: Tensor) -> float:
    return float(((one - other).double() ** 2).sum())


def _scaled(predicted: FloatArray, ranks: Sequence[int], errors: Sequence[float]) -> FloatArray:
    """`predicted`, times measured / predicted at `ranks`, whose logarithm is interpolated between them."""
    at = np.array(ranks)
    known = (predicted[at] > 0) & (np.array(errors) > 0)
    if not known.any():
        return predicted
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

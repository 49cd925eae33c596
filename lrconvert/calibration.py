"""Running a network on a few examples to learn what each of its weights meets, as a `Response`.

A weight is recognised where it is used: every product with it passes through `_Watch`, be it computed by a module or by
a parent that reads the weight. The output y of the network is projected on random numbers, ⟨z, y⟩ with z ~ N(0, I), and
differentiated once: without labels, E[g gᵀ] of what arrives at a layer says how its outputs move those of the network.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lrconvert.allocation import FloatArray
from lrconvert.errors import UsageError
from lrconvert.heads import Head
from lrconvert.inputs import Call
from lrconvert.layers import Layer
from lrconvert.layers.explicit import explicit
from lrconvert.modes import evaluating
from lrconvert.products import Product, product_of
from lrconvert.response import Response

# Bytes of second moments that are collected in one go; where all layers need more, the calls are repeated.
_MEMORY = 4 << 30


@dataclass(frozen=True)
class Calibration:
    """What a network met.

    Attributes:
        responses: by layer name; layers that the examples did not reach are missing.
        examples: how many there were.
        two_sided: whether gradients are in the responses. Squared errors are then in one unit, that of the network's
            output for one example, and may be added over layers; else they are each layer's own.
        measured: by layer name, what `lrconvert.sensitivity` measured, where it was asked to.
        output_energy: mean ‖y‖² of the network's (first) output for one example.
        seconds: how long it took.
        notes: where the examples come from, in words.
    """

    responses: Mapping[str, Response]
    examples: int
    two_sided: bool
    output_energy: float
    seconds: float
    measured: Mapping[str, FloatArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def curves(self) -> dict[str, FloatArray]:
        """By layer name, predicted squared error of the output at every rank (full_rank + 1,), from 0 up."""
        curves = {}
        for name, response in self.responses.items():
            energies = (response.spectrum.values**2).sum(dim=0)
            if not self.two_sided and float(energies.sum()):
                energies = energies / energies.sum()  # in units of its own: relative errors can be compared at least
            tails = energies.flip(0).cumsum(0).flip(0)
            curves[name] = torch.cat([tails, tails.new_zeros(1)]).numpy()
        return curves


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    calls: Sequence[Call],
    *,
    two_sided: bool = True,
    projections: int = 1,
    head: Head | None = None,
    device: torch.device | None = None,
    memory: int = _MEMORY,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> Calibration:
    """Run `model` in eval mode on `calls` and collect the second moments of `layers`.

    Args:
        model: with its weights; it is left as it was.
        layers: what to watch. Embeddings, transposed convolutions and the spatial view have no response, nor have
            recurrent layers that are called with packed sequences.
        calls: arguments of the model, batches of examples. Tokens that an "attention_mask" hides are not counted.
        two_sided: differentiate too.
        projections: draws of z for each call, each with a backward pass of its own.
        head: what of the output counts; the first tensor in it if None.
        device: where to run; the model is moved there and back.
        memory: bytes of second moments that may be held at a time.
        seed: of z.
        progress: called after each call.

    Raises:
        UsageError: there are no calls, or their output holds no floating-point numbers.
    """
    started = time.perf_counter()
    if not calls:
        raise UsageError("calibration needs examples, and there are none")
    home = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    responses: dict[str, Response] = {}
    examples, energy = 0, 0.0
    with at_rest(model.to(device or home)), explicit(model) as running:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        # Of a file with older keys than the model's some layers have no parameter of their name.
        watched = [layer for layer in layers if can_respond(layer) and layer.weight in parameters]
        for part in _parts(watched, memory):
            examples, energy, generator = 0, 0.0, torch.Generator().manual_seed(seed)
            watch = _Watch({id(parameters[layer.weight]): _Moments(layer, two_sided, projections) for layer in part})
            for call in calls:
                watch.mask = mask_of(call, device or home)
                with torch.set_grad_enabled(two_sided), watch:
                    output = output_of(running, call, head)
                examples += call.size
                energy += float((output.detach().double() ** 2).sum())
                for left in reversed(range(projections if output.requires_grad else 0)):
                    z = torch.randn(output.shape, generator=generator).to(output)
                    torch.autograd.backward(output, z / projections**0.5, retain_graph=left > 0)
                if progress:
                    progress()
            responses |= watch.responses(examples)
    model.to(home)
    return Calibration(responses, examples, two_sided, energy / examples, time.perf_counter() - started)


def can_respond(layer: Layer) -> bool:
    """Whether calibration knows what the weight of `layer` meets."""
    return layer.view == "channel" and layer.kind != "embedding" and not layer.kind.startswith("conv_transpose")


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """While it lasts, `model` is in eval mode and its parameters want no gradients."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with evaluating(model):
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)


def _parts(layers: Sequence[Layer], memory: int) -> Iterator[list[Layer]]:
    """`layers` in groups whose moments fit into `memory` bytes, a single layer at least."""
    part: list[Layer] = []
    used = 0
    for layer in layers:
        size = 2 * 8 * layer.groups * layer.full_rank**2
        if part and used + size > memory:
            yield part
            part, used = [], 0
        part.append(layer)
        used += size
    if part:
        yield part


def mask_of(call: Call, device: torch.device) -> Tensor | None:
    """Which tokens (batch, length) count, as booleans, where the call says so."""
    mask = call.kwargs.get("attention_mask")
    return mask.to(device).bool() if mask is not None and mask.dim() == 2 else None


def output_of(model: nn.Module, call: Call, head: Head | None = None) -> Tensor:
    """The first floating-point tensor that `model` returns, logits or hidden states; zero for tokens that are hidden.

    With a `head`, what that makes of all that `model` returns.

    Raises:
        UsageError: it returns none.
    """
    returned = call.run(model)
    if head is not None:
        return head(returned, call.kwargs.get("attention_mask"))
    leaves = tree_leaves(dict(returned) if isinstance(returned, Mapping) else returned)
    output = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
    if output is None:
        raise UsageError(f"the network returned {type(returned).__name__} without a floating-point tensor in it")
    mask = mask_of(call, output.device)
    # (batch, length) alone could be logits of as many classes as there are tokens.
    if mask is None or output.dim() < 3 or output.shape[:2] != mask.shape:
        return output
    return output * mask.reshape(*mask.shape, *[1] * (output.dim() - 2))


class _Moments:
    """The sums that become one layer's response."""

    def __init__(self, layer: Layer, two_sided: bool, projections: int) -> None:
        rows, columns = layer.matrix_shape
        self.layer, self.two_sided, self.projections = layer, two_sided, projections
        self.rows_side = rows <= columns
        size = (layer.groups, layer.full_rank, layer.full_rank)
        self.forward_sum, self.backward_sum = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        self.mean = torch.zeros(size[:2], dtype=torch.float64)
        self.positions = torch.zeros(layer.groups, dtype=torch.float64)
        self.reached = False

    def forward(self, product: Product, output: Tensor, groups: slice, keep: Tensor | None) -> Tensor:
        """Count what a product saw, and return it: (groups, n, s) outputs of the weight, or inputs."""
        count = len(range(*groups.indices(self.layer.groups)))
        seen = product.outputs(output.detach(), count) if self.rows_side else product.inputs(count).detach()
        if self.rows_side and product.bias is not None:
            seen = seen - product.bias.detach().reshape(count, 1, -1)
        elif self.two_sided:
            seen = seen.clone()  # it may be overwritten before the gradient arrives
        seen = seen if keep is None else seen[:, keep]
        self.mean[groups] += seen.sum(dim=1, dtype=torch.float64).cpu()
        self.positions[groups] += seen.shape[1]
        if not self.two_sided:
            self.forward_sum[groups] += _gram(seen)
        return seen

    def backward(self, product: Product, seen: Tensor, groups: slice, keep: Tensor | None, gradient: Tensor) -> None:
        """Add what a product saw, now that the gradient of its outputs is known."""
        self.reached = True
        arrived = product.outputs(gradient, len(seen))
        arrived = arrived if keep is None else arrived[:, keep]
        # Half of C is weighted by what each position means for the output: E[x xᵀ]·E[g gᵀ] says nothing of positions
        # that are large in both. On a sentence encoder neither half alone keeps as much (benchmarks/README.md).
        weights = (arrived**2).sum(dim=2, keepdim=True)
        mean = weights.mean(dim=1, keepdim=True)
        weights = torch.where(mean > 0, (1 + weights / mean) / 2, 1.0) / self.projections
        self.forward_sum[groups] += _gram(seen * weights.sqrt().to(seen.dtype))
        if not self.rows_side:
            arrived = arrived @ self.layer.layout.matrices(product.weight.detach(), len(seen)).to(arrived.dtype)
        self.backward_sum[groups] += _gram(arrived)

    def response(self, weight: Tensor, examples: int) -> Response | None:
        """The response, if anything was seen; `weight` is the layer's."""
        if not bool((self.positions > 0).all()) or (self.two_sided and not self.reached):
            return None
        name, positions = self.layer.name, self.positions[:, None, None]
        mean = self.mean / self.positions[:, None]
        if self.rows_side:
            if not self.two_sided:
                return Response(name, "rows", None, self.forward_sum / positions, mean)
            return Response(name, "rows", self.backward_sum / positions, self.forward_sum / examples, mean)
        if self.two_sided:
            return Response(name, "columns", self.forward_sum / positions, self.backward_sum / examples, mean)
        matrices = self.layer.layout.matrices(weight.detach().double().cpu(), self.layer.groups)
        return Response(name, "columns", self.forward_sum / positions, matrices.mT @ matrices, mean)


def _gram(rows: Tensor) -> Tensor:
    """Σ x xᵀ (groups, s, s) of (groups, n, s): products of one call in float32, summed over calls in float64."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows.mT @ rows).double().cpu()


class _Watch(TorchFunctionMode):
    """Sees every function of torch that the network calls, and adds up the products with the weights it knows."""

    def __init__(self, moments: Mapping[int, _Moments]) -> None:
        super().__init__()
        self.moments = moments
        self.mask: Tensor | None = None
        self.weights: dict[str, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What `func` returns."""
        output = func(*args, **(kwargs or {}))
        product = product_of(func, args, kwargs or {})
        if product is None:
            return output
        owner = product.weight if id(product.weight) in self.moments else product.weight._base
        moments = self.moments.get(id(owner))
        if moments is None or owner is None:
            return output
        self.weights[moments.layer.name] = owner
        groups = _groups(product.weight, owner, moments.layer)
        leading = output.shape[: self.mask.dim()] if self.mask is not None else ()
        keep = self.mask.flatten() if self.mask is not None and leading == self.mask.shape else None
        seen = moments.forward(product, output, groups, keep)
        if moments.two_sided:
            ends_here = not output.requires_grad  # the first products
            hook = partial(moments.backward, product, seen, groups, keep)
            output.requires_grad_().register_hook(hook)
            output = output.clone() if ends_here else output  # what follows may work in place
        return output

    def responses(self, examples: int) -> dict[str, Response]:
        """What was seen, by layer name."""
        found = {}
        for moments in self.moments.values():
            name = moments.layer.name
            response = moments.response(self.weights[name], examples) if name in self.weights else None
            if response is not None:
                found[name] = response
        return found


def _groups(weight: Tensor, owner: Tensor, layer: Layer) -> slice:
    """Which matrices of a layer the tensor `weight` holds: all, or those of a part of packed projections.

    Projections that are taken together are one matrix, of which a part has all columns: the smaller side.
    """
    if layer.groups == 1 or weight.numel() == owner.numel():
        return slice(0, layer.groups)
    each = owner.numel() // layer.groups
    first = weight.storage_offset() - owner.storage_offset()
    return slice(first // each, (first + weight.numel()) // each)

"""Running a network on a few examples to learn what each of its weights meets, as a `Response`.

A weight is recognised where it is used: every product with it passes through `_Watch`, be it computed by a module or by
a parent that reads the weight. The output y of the network is projected on random numbers, ⟨z, y⟩ with z ~ N(0, I), and
differentiated once: without labels, E[g gᵀ] of what arrives at a layer says how its outputs move those of the network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrconvert.allocation import FloatArray
from lrconvert.errors import UsageError
from lrconvert.heads import Head
from lrconvert.inputs import Call
from lrconvert.layers import COMPOSITE_KINDS, EXPERT_KINDS, Layer
from lrconvert.layers.explicit import explicit
from lrconvert.modes import at_rest
from lrconvert.moments import summed_products, wide
from lrconvert.outputs import floats_in, shown, shown_rows, token_mask
from lrconvert.products import Product, product_of
from lrconvert.response import Response

# Positions that a weight's moments are taken from, as a multiple of their size, and the fewest: thousands of pixels an
# image say little more, and cost more than the network itself.
_POSITIONS, _FEWEST = 16, 4096
# Bytes of second moments that are collected in one go; where all layers need more, the calls are repeated.
_MEMORY = 4 << 30
# Second moments of what experts that were never seen might meet, as a share of what others do.
_LITTLE, _TINY = 1e-9, torch.finfo(torch.float64).tiny


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
        notes: where the examples come from, in words.
        calls: the examples themselves.
    """

    responses: Mapping[str, Response]
    examples: int
    two_sided: bool
    output_energy: float
    measured: Mapping[str, FloatArray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()

    @property
    def allocator(self) -> str:
        """Who distributes a budget by default: without gradients, measurements bring the errors into one unit."""
        return "output_error" if self.two_sided or not self.measured else "sensitivity"

    def curves(self) -> dict[str, FloatArray]:
        """By layer name, predicted squared error of the output at every rank (full_rank + 1,), from 0 up."""
        curves = {}
        for name, response in self.responses.items():
            tails = response.spectrum.tail_energies()
            if not self.two_sided and float(tails[0]):
                tails = tails / tails[0]  # in units of its own: relative errors can be compared at least
            curves[name] = tails.numpy()
        return curves

    def curves_for(self, allocator: str) -> Mapping[str, FloatArray] | None:
        """The curves that an allocator of `lrconvert.budget.FROM_EXAMPLES` goes by; None for any other."""
        if allocator == "output_error":
            return self.curves()
        return self.measured if allocator == "sensitivity" else None


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
        memory: bytes of sums that may be open at a time; what they become, two matrices a layer, is kept beside them.
        seed: of z.
        progress: called after each call.

    Raises:
        UsageError: there are no calls, or their output holds no floating-point numbers.
    """
    if not calls:
        raise UsageError("calibration needs examples, and there are none")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Of a file with older keys than the model's some layers have no parameter of their name.
    watched = [layer for layer in layers if can_respond(layer) and layer.weight in parameters]
    examples = sum(call.size for call in calls)
    responses: dict[str, Response] = {}
    energy = 0.0
    with at_rest(model, device=device) as here, explicit(model) as running:
        for part in _parts(watched, memory):
            energy, generator = 0.0, torch.Generator().manual_seed(seed)
            moments = [
                _Moments(layer, parameters.get(layer.bias_key), two_sided, projections, len(calls)) for layer in part
            ]
            watch = _Watch({id(parameters[each.layer.weight]): each for each in moments})
            for call in calls:
                watch.mask = token_mask(call, here)
                with torch.set_grad_enabled(two_sided), watch:
                    output = output_of(running, call, head)
                energy += energy_of(output)
                for left in reversed(range(projections if output.requires_grad else 0)):
                    z = torch.randn(output.shape, generator=generator).to(output)
                    torch.autograd.backward(output, z / projections**0.5, retain_graph=left > 0)
                if progress:
                    progress()
            responses |= watch.responses(examples)
    return Calibration(responses, examples, two_sided, energy / examples, calls=tuple(calls))


def can_respond(layer: Layer) -> bool:
    """Whether calibration knows what the weight of `layer` meets."""
    return layer.view == "channel" and layer.kind != "embedding" and not layer.kind.startswith("conv_transpose")


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


def outputs_of(model: nn.Module, call: Call, head: Head | None = None) -> list[Tensor]:
    """The floating-point tensors that `model` returns, logits or hidden states first, without tokens that are hidden.

    With a `head`, what that makes of all that `model` returns.

    Raises:
        UsageError: it returns none.
    """
    returned = call.run(model)
    outputs = floats_in(returned)
    if not outputs:
        raise UsageError(f"the network returned {type(returned).__name__} without a floating-point tensor in it")
    mask = token_mask(call, outputs[0].device)
    return [shown(output, mask) for output in outputs] if head is None else [head(returned, mask)]


def output_of(model: nn.Module, call: Call, head: Head | None = None) -> Tensor:
    """The first of `outputs_of`: what counts of the output."""
    return outputs_of(model, call, head)[0]


def energy_of(output: Tensor) -> float:
    """‖y‖² of an output, less what is not finite: logits of what is forbidden are −∞."""
    return float(torch.nan_to_num(output.detach().double(), 0.0, 0.0, 0.0).square().sum())


class _Moments:
    """The sums that become one layer's response."""

    def __init__(self, layer: Layer, bias: Tensor | None, two_sided: bool, projections: int, calls: int) -> None:
        rows, columns = layer.matrix_shape
        self.layer, self.two_sided, self.projections = layer, two_sided, projections
        self.rows_side = rows <= columns
        self.enough = -(-max(_POSITIONS * layer.full_rank, _FEWEST) // calls)
        size = (layer.groups, layer.full_rank, layer.full_rank)
        self.forward_sum, self.backward_sum = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        self.mean = torch.zeros(size[:2], dtype=torch.float64)
        self.positions, self.kept = (torch.zeros(layer.groups, dtype=torch.float64) for _ in range(2))
        self.bias = bias
        # Whether a parent that reads the weight adds anything but the layer's own bias.
        self.reached = self.unreadable = self.other_bias = False

    def forward(self, product: Product, output: Tensor, groups: slice, n: int, keep: Tensor | None) -> Tensor:
        """Count what a product saw, and return it: (groups, n, s) outputs of the weight, or inputs.

        Args:
            product: with the weight, or a part of it.
            output: what it computed.
            groups: the matrices that it holds.
            n: positions that count.
            keep: those to look at; all if None.
        """
        count = len(range(*groups.indices(self.layer.groups)))
        if self.rows_side:
            seen = product.outputs(output.detach(), count, keep)
            seen = seen if product.bias is None else seen - product.bias.detach().reshape(count, 1, -1)
        else:
            seen = product.inputs(count).detach()
            seen = seen if keep is None else seen[:, keep]
        self.other_bias |= product.bias is not self.bias
        self.positions[groups] += n
        self.kept[groups] += seen.shape[1]
        if not self.two_sided:
            self._add(seen, torch.ones(len(seen), seen.shape[1], 1, device=seen.device), groups)
            return seen
        return seen.clone()  # it may be overwritten before the gradient arrives

    def backward(self, product: Product, seen: Tensor, groups: slice, keep: Tensor | None, gradient: Tensor) -> None:
        """Add what a product saw, now that the gradient of its outputs is known."""
        self.reached = True
        arrived = wide(product.outputs(gradient, len(seen), keep))
        # Half of C is weighted by what each position means for the output: E[x xᵀ]·E[g gᵀ] says nothing of positions
        # that are large in both.
        weights = (arrived**2).sum(dim=2, keepdim=True)
        mean = weights.mean(dim=1, keepdim=True)
        weights = torch.where(mean > 0, (1 + weights / mean) / 2, 1.0) / self.projections
        self._add(seen, weights, groups)
        if not self.rows_side:
            weight = product.weight.detach()
            expert = self.layer.kind in EXPERT_KINDS
            matrices = weight[None] if expert else self.layer.layout.matrices(weight, len(seen))
            arrived = arrived @ matrices.to(arrived.dtype)
        self.backward_sum[groups] += summed_products(arrived, arrived)

    def _add(self, seen: Tensor, weights: Tensor, groups: slice) -> None:
        """Add (groups, n, s), each position by its weight (groups, n, 1)."""
        seen = wide(seen)
        weights = weights.to(seen)
        self.mean[groups] += (seen * weights).sum(dim=1, dtype=torch.float64).cpu()
        rooted = seen * weights.sqrt()
        self.forward_sum[groups] += summed_products(rooted, rooted)

    def response(self, weight: Tensor, examples: int) -> Response | None:
        """The response, if anything was seen; `weight` is the layer's."""
        if self.layer.kind in EXPERT_KINDS:
            self._expect_little_of_unseen(weight)
        if self.unreadable or not bool((self.positions > 0).all()) or (self.two_sided and not self.reached):
            return None
        name, kept = self.layer.name, self.kept[:, None, None]
        # Of the second moment that errors are measured in, the sum over all positions of an example.
        an_example = self.positions[:, None, None] / kept / examples
        mean = self.mean / self.kept[:, None]
        if self.layer.kind not in COMPOSITE_KINDS:
            if self.other_bias:  # a correction of the layer's bias would be lost
                mean = torch.zeros_like(mean)
            elif self.bias is not None:  # it makes up for the mean: only what varies is left to the weight
                self.forward_sum -= kept * mean[:, :, None] * mean[:, None, :]
        if self.rows_side:
            if not self.two_sided:
                return Response(name, "rows", None, self.forward_sum / kept, mean)
            return Response(name, "rows", self.backward_sum / kept, self.forward_sum * an_example, mean)
        if self.two_sided:
            return Response(name, "columns", self.forward_sum / kept, self.backward_sum * an_example, mean)
        matrices = self.layer.layout.matrices(weight.detach().double().cpu(), self.layer.groups)
        return Response(name, "columns", self.forward_sum / kept, matrices.mT @ matrices, mean)

    def _expect_little_of_unseen(self, weight: Tensor) -> None:
        """For experts that no token went to: inputs that are alike in all directions, and too small to decide anything.

        Their factors are then those of the weight alone.
        """
        unseen = self.positions == 0
        if not bool(unseen.any()) or bool(unseen.all()):
            return
        matrices = self.layer.layout.matrices(weight.detach().double().cpu(), self.layer.groups)[unseen]
        own = matrices @ matrices.mT if self.rows_side else matrices.mT @ matrices
        alike = torch.eye(own.shape[1], dtype=own.dtype).expand_as(own)
        forward, backward = (own, alike) if self.rows_side else (alike, own)
        for sums, shape, share in ((self.forward_sum, forward, _LITTLE), (self.backward_sum, backward, 1.0)):
            usual = (_traces(sums) / self.kept)[~unseen].mean()
            sums[unseen] = share * usual * shape / _traces(shape).clamp(min=_TINY)[:, None, None]
        self.positions[unseen] = self.kept[unseen] = 1


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(dim=1)


class _Watch(TorchFunctionMode):
    """Sees every function of torch that the network calls, and adds up the products with the weights it knows."""

    def __init__(self, moments: Mapping[int, _Moments]) -> None:
        super().__init__()
        self.moments = moments
        self.mask: Tensor | None = None
        self.generator = torch.Generator().manual_seed(0)
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
        if not _is_part(product.weight, owner, moments.layer):
            moments.unreadable = True
            return output
        groups = _groups(product.weight, owner, moments.layer)
        n, keep = self._positions(product, output, moments)
        seen = moments.forward(product, output, groups, n, keep)
        if moments.two_sided:
            ends_here = not output.requires_grad  # the first products
            output.requires_grad_().register_hook(partial(moments.backward, product, seen, groups, keep))
            output = output.clone() if ends_here else output  # what follows may work in place
        return output

    def _positions(self, product: Product, output: Tensor, moments: "_Moments") -> tuple[int, Tensor | None]:
        """How many positions of a product count, and the numbers of those to look at; None for all there are."""
        n = output.numel() // output.shape[product.channels]
        shown = shown_rows(output.shape[:-1], self.mask) if product.channels == -1 else None
        n = n if shown is None else len(shown)
        if n <= moments.enough:
            return n, shown
        chosen = torch.randint(n, (moments.enough,), generator=self.generator).to(output.device)
        return n, chosen if shown is None else shown[chosen]

    def responses(self, examples: int) -> dict[str, Response]:
        """What was seen, by layer name."""
        found = {}
        for moments in self.moments.values():
            name = moments.layer.name
            response = moments.response(self.weights[name], examples) if name in self.weights else None
            if response is not None:
                found[name] = response
        return found


def _is_part(weight: Tensor, owner: Tensor, layer: Layer) -> bool:
    """Whether `weight` is `owner`, a third of packed projections, or an expert; not its transpose, or some rows."""
    if layer.kind in EXPERT_KINDS:
        return tuple(weight.shape) == layer.matrix_shape
    third = layer.kind == "attention" and len(weight) * 3 == len(owner) and weight.stride() == owner.stride()
    return weight is owner or (third and weight.shape[1:] == owner.shape[1:])


def _groups(weight: Tensor, owner: Tensor, layer: Layer) -> slice:
    """Which matrices of a layer the tensor `weight` holds: all, or those of a part of projections or experts.

    Projections that are taken together are one matrix, of which a part has all columns: the smaller side.
    """
    if layer.groups == 1 or weight.numel() == owner.numel():
        return slice(0, layer.groups)
    each = owner.numel() // layer.groups
    first = weight.storage_offset() - owner.storage_offset()
    return slice(first // each, (first + weight.numel()) // each)

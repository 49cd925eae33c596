"""Mixtures of experts of transformers: the weights of all experts in one parameter, a matrix for each.

Every such module there keeps one contract, by which transformers itself puts faster functions in the place of its
forward (`transformers.integrations.moe.use_experts_implementation`): what `has_gate`, `has_bias`, `is_transposed` and
`has_post_expert_norm` say, and the method `_apply_gate`. The module here keeps the same, so it stands for all of them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrconvert.layers.composite import LowRankComposite
from lrconvert.layers.eager import captured
from lrconvert.layers.lowrank import Factored

# What the contract names, but for what older versions of transformers do not have.
_CONTRACT = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")


def is_experts(module: nn.Module) -> bool:
    """Whether `module` keeps the contract, known by its attributes so that transformers need not be imported."""
    if not all(hasattr(module, name) for name in _CONTRACT) or len(expert_weights(module)) != 2:
        return False
    # What transformers makes of a class leaves the forward that it wraps behind; a subclass may have its own.
    return hasattr(type(module).forward, "__wrapped__")


def expert_weights(module: Any) -> dict[str, int]:
    """By name, the number of matrices in each weight of experts; none where they are not stacked."""
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    found = {name: getattr(module, name, None) for name in names}
    return {name: len(weight) for name, weight in found.items() if isinstance(weight, Tensor) and weight.dim() == 3}


@contextmanager
def running(model: nn.Module, implementation: str) -> Iterator[None]:
    """While it lasts, dense experts in `model` run this implementation of those that transformers has.

    With "batched_mm" every token gets a copy of its experts: slow, but nothing depends on the numbers in a tensor.
    """
    configs: dict[int, Any] = {id(module.config): module.config for module in model.modules() if is_experts(module)}
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = implementation
        yield
    finally:
        for config, name in before:
            config._experts_implementation = name


def pairs_routed(module: nn.Module, arguments: Iterable[Any]) -> int | None:
    """Pairs of a token and an expert in a call of a mixture of experts, dense or factorized; None for other modules."""
    if not (is_experts(module) or isinstance(module, LowRankExperts)):
        return None
    indices = (each for each in arguments if isinstance(each, Tensor) and not each.is_floating_point())
    return next(indices).numel()


class ExpertFactor(nn.Module):
    """A matrix for each expert: weight (experts, out, in)."""

    def __init__(self, shape: Sequence[int], place: Mapping[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape, **place))

    def extra_repr(self) -> str:
        """Sizes."""
        experts, out, into = self.weight.shape
        return f"experts={experts}, in_features={into}, out_features={out}"


class ExpertFactors(nn.Module):
    """The factors `u` and `v` of the weights of all experts, uninitialised."""

    def __init__(self, factored: Factored, place: Mapping[str, Any]) -> None:
        super().__init__()
        u, v = factored.layout.factor_shapes(factored.shape, factored.groups, factored.rank)
        self.u, self.v = ExpertFactor(u, place), ExpertFactor(v, place)


@dataclass(frozen=True)
class _Routing:
    """Which row of a tensor belongs to which expert.

    Attributes:
        experts: (rows,), the expert of each row.
        rows: of each expert, where rows are sorted by expert; None where nobody may look into `experts`.
    """

    experts: Tensor
    rows: list[int] | None

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Every row of `x` (rows, in) times the matrix of its expert; `weight` (experts, out, in)."""
        if self.rows is None:
            return torch.bmm(weight[self.experts], x.unsqueeze(-1)).squeeze(-1)
        # Not weight[expert]: in the backward pass each would fill a tensor of the whole weight's size.
        parts = zip(x.split(self.rows), weight.unbind(), strict=True)
        made = [functional.linear(part, matrix) for part, matrix in parts if len(part)]
        return torch.cat(made) if made else functional.linear(x, weight[0])


class LowRankExperts(LowRankComposite):
    """Takes the place of the experts of a mixture, with their forward signature and results.

    Tokens are sorted by expert, and each expert's factors are applied to its own. Where a graph is made, which cannot
    depend on how many there are, every token gets a copy of its experts' factors instead.
    """

    def __init__(self, dense: nn.Module, wanted: Mapping[str, Factored]) -> None:
        super().__init__(dense, wanted)
        for name, child in dense.named_children():
            self.add_module(name, child)
        # Not in the skeleton, which has copies: who changes the model's configuration means that of all its modules.
        self.config = dense.config
        if "act_fn" in vars(dense):
            self.act_fn = dense.act_fn

    def new_factors(self, factored: Factored, place: Mapping[str, Any]) -> nn.Module:
        """A stack of factors, a pair for each expert."""
        return ExpertFactors(factored, place)

    def dense(self) -> nn.Module:
        """As for other modules; with the model's own configuration, which may name an implementation."""
        dense = super().dense()
        dense.config = self.config
        return dense

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the dense experts return.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, chosen), the experts that each token goes to.
            top_k_weights: (tokens, chosen), the share of each in the sum.

        Returns:
            (tokens, hidden).
        """
        chosen = top_k_index.shape[1]
        experts = top_k_index.flatten()
        order = None
        if not captured() and not experts.is_meta:
            order = experts.argsort(stable=True)
            routing = _Routing(experts[order], experts.bincount(minlength=self.num_experts).tolist())
            x = hidden_states[order // chosen]
        else:
            routing = _Routing(experts, None)
            x = hidden_states.repeat_interleave(chosen, dim=0)
        x = self._multiplied("gate_up_proj" if self.has_gate else "up_proj", x, routing)
        dense: Any = type(self._skeleton[0])
        x = dense._apply_gate(self, x) if self.has_gate else self.act_fn(x)  # type: ignore[operator]
        x = self._multiplied("down_proj", x, routing)
        if getattr(self, "has_post_expert_norm", False):
            x = self.post_expert_norm(x)
        if order is not None:
            x = x[order.argsort()]
        shares = top_k_weights.flatten().unsqueeze(-1)
        return (x * shares).unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)

    def _multiplied(self, name: str, x: Tensor, routing: _Routing) -> Tensor:
        """The weight `name`, and a bias if there is one, applied to rows (rows, in)."""
        if name in self.factored:
            factors = self.factors(name)
            x = routing.multiply(routing.multiply(x, factors.u.weight), factors.v.weight)
        else:
            weight = getattr(self, name)
            x = routing.multiply(x, weight.mT if self.is_transposed else weight)
        return x + getattr(self, f"{name}_bias")[routing.experts].to(x.dtype) if self.has_bias else x

"""Hypothesis strategies: a module of any family, and a call that its replacement must answer in the same way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from transformers import GptOssConfig, MixtralConfig, MuseSparkTextConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.pytorch_utils import Conv1D

from lrconvert.layers import EXPERT_KINDS, FAMILIES, LAYOUTS
from lrconvert.layers.recurrent import RECURRENT_TYPES
from lrconvert.layers.survey import layers_of_module
from lrconvert.plan import LayerPlan, Plan
from lrconvert.views import can_pivot

KINDS = sorted(LAYOUTS)


@dataclass(frozen=True)
class Drawn:
    """A dense module, and how to call it: from a module to one tensor that holds everything it returned."""

    kind: str
    module: nn.Module
    call: Callable[[nn.Module], torch.Tensor]
    dtype: torch.dtype


@st.composite
def modules(draw, kinds=KINDS):
    """Any module that can be factorized."""
    kind = draw(st.sampled_from(kinds))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    make = _linear if kind in ("linear", "transposed_linear") else _conv if "conv" in kind else None
    make = make or (_experts if kind in EXPERT_KINDS else None)
    make = make or {"embedding": _embedding, "attention": _attention}.get(kind, _recurrent)
    module, call = make(draw, kind, dtype)
    return Drawn(kind, module.to(dtype), call, dtype)


def cancels(module, output):
    """Whether the products and the bias in `output` nearly cancel: then rounding alone is a large part of it."""
    bias = getattr(module, "bias", None)
    return isinstance(bias, torch.Tensor) and float(output.norm()) < 0.05 * float(bias.detach().norm())


@st.composite
def plans(draw, module, full_rank=False, norm=False):
    """A plan for `ModuleDict({"it": module})`: some or all of its weights, at any rank, perhaps with a norm between.

    Factors that can be pivoted are, or are not.
    """
    layers = [
        layer for layer in layers_of_module(nn.ModuleDict({"it": module})) if layer.guess or not layer.dense_reason
    ]
    chosen = layers if full_rank else draw(st.lists(st.sampled_from(layers), min_size=1, unique=True))
    decisions = []
    for layer in chosen:
        stacks = "conv" in layer.kind or layer.kind in EXPERT_KINDS
        groups = layer.groups if stacks else draw(st.sampled_from([1, layer.groups]))
        if layer.kind in ("linear", "transposed_linear"):
            parts = [parts for parts in (1, 2, 3) if layer.layout.stacked(layer.shape) % parts == 0]
            groups = draw(st.sampled_from(parts))
        layer = replace(layer, groups=groups, norm=norm)
        layer = replace(layer, pivoted=can_pivot(layer) and draw(st.booleans()))
        rank = layer.full_rank if full_rank else draw(st.integers(1, layer.full_rank))
        decisions.append(LayerPlan.of(layer, rank))
    return Plan(layers=tuple(decisions))


def _linear(draw, kind, dtype):
    into, out = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    x = torch.randn(*draw(st.sampled_from([(3,), (2, 5), ()])), into, dtype=dtype)
    if kind == "linear":
        return nn.Linear(into, out, bias=draw(st.booleans())), lambda module: module(x)
    layer = Conv1D(out, into)
    nn.init.normal_(layer.bias)
    return layer, lambda module: module(x)


def _embedding(draw, kind, dtype):
    entries, features = draw(st.integers(2, 40)), draw(st.integers(1, 30))
    layer = nn.Embedding(entries, features, padding_idx=draw(st.sampled_from([None, 1])))
    indices = torch.randint(0, entries, draw(st.sampled_from([(3,), (2, 5)])))
    indices.view(-1)[0] = 0  # not the padding entry alone, whose output is zero
    return layer, lambda module: module(indices)


def _conv(draw, kind, dtype):
    dims, transposed = int(kind[-2]), "transpose" in kind
    groups = draw(st.integers(1, 3))
    into, out = groups * draw(st.integers(2, 6)), groups * draw(st.integers(1, 6))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    settings = {
        "kernel_size": tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        "stride": stride,
        "padding": tuple(draw(st.integers(0, 1)) for _ in range(dims)),
        "dilation": tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    make = FAMILIES[kind].dense
    if transposed:
        settings["output_padding"] = tuple(draw(st.integers(0, step - 1)) for step in stride)
    elif kind == "conv2d" and draw(st.booleans()):
        make = Conv2dSame  # whatever padding it is given, it pads in its own way
    else:
        settings["padding_mode"] = draw(st.sampled_from(["zeros", "replicate", "circular"]))
    layer = make(into, out, **settings)
    x = torch.randn(2, into, *(draw(st.integers(6, 9)) for _ in range(dims)), dtype=dtype)
    return layer, lambda module: module(x)


def _attention(draw, kind, dtype):
    heads = draw(st.sampled_from([1, 2, 3]))
    embed = heads * draw(st.integers(2, 6))
    other = draw(st.booleans())
    widths = {"kdim": embed + 3, "vdim": embed + 1} if other else {}
    batch_first, extra = draw(st.booleans()), draw(st.booleans())
    layer = nn.MultiheadAttention(
        embed,
        heads,
        bias=draw(st.booleans()),
        add_bias_kv=extra,
        add_zero_attn=draw(st.booleans()),
        batch_first=batch_first,
        **widths,
    )
    for name in ("in_proj_bias", "out_proj.bias"):  # torch starts them at zero
        parameter = dict(layer.named_parameters()).get(name)
        if parameter is not None:
            nn.init.normal_(parameter)
    batch, length, source = 3, draw(st.integers(2, 5)), draw(st.integers(2, 5))
    self_attention = not other and draw(st.booleans())
    source = length if self_attention else source
    batched = draw(st.booleans())

    def tensor(size, width):
        shape = ((batch, size) if batch_first else (size, batch)) if batched else (size,)
        return torch.randn(*shape, width, dtype=dtype)

    query = tensor(length, embed)
    key = query if self_attention else tensor(source, widths.get("kdim", embed))
    value = query if self_attention else tensor(source, widths.get("vdim", embed))
    settings = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    if draw(st.booleans()):
        mask = torch.rand(*((batch, source) if batched else (source,))) < 0.3
        mask[..., 0] = False
        settings["key_padding_mask"] = mask
    if draw(st.booleans()):
        rows = batch * heads if batched and draw(st.booleans()) else None
        mask = torch.rand(*((rows,) if rows else ()), length, source) < 0.3
        mask[..., 0] = False
        settings["attn_mask"] = mask

    def call(module):
        out, weights = module(query, key, value, **settings)
        return out.reshape(-1) if weights is None else torch.cat([out.reshape(-1), weights.reshape(-1)])

    return layer, call


def _experts_like(make, config, names, hidden, inner, experts, implementation="eager"):
    """Experts of transformers in random numbers; `names` of the three sizes in their configuration."""
    settings = config()
    for name, size in zip(names, (hidden, inner, experts), strict=True):
        setattr(settings, name, size)
    settings._experts_implementation = implementation
    layer = make(settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


_USUAL = ("hidden_size", "intermediate_size", "num_local_experts")
_MUSE = ("moe_hidden_size", "moe_intermediate_size", "num_local_experts")
_NEMOTRON = ("hidden_size", "moe_intermediate_size", "n_routed_experts")
# With a gate; with biases, a gate of its own kind and weights stored (experts, in, out); without a gate; with a norm.
experts_of_mixtral = partial(_experts_like, MixtralExperts, MixtralConfig, _USUAL)
experts_of_gpt_oss = partial(_experts_like, GptOssExperts, GptOssConfig, _USUAL)
_experts_of_nemotron = partial(_experts_like, NemotronHExperts, NemotronHConfig, _NEMOTRON)
_experts_of_muse = partial(_experts_like, MuseSparkExperts, MuseSparkTextConfig, _MUSE)


def _experts(draw, kind, dtype):
    makes = [experts_of_mixtral, _experts_of_nemotron, _experts_of_muse] if kind == "experts" else [experts_of_gpt_oss]
    # Not one number alone: where the product of a gate happens to be next to nothing, rounding is a large part of it.
    hidden, inner, experts = draw(st.integers(4, 9)), draw(st.integers(4, 7)), draw(st.integers(2, 5))
    implementation = draw(st.sampled_from(["eager", "batched_mm"]))
    layer = draw(st.sampled_from(makes))(hidden, inner, experts, implementation=implementation)
    tokens, chosen = draw(st.integers(3, 8)), draw(st.integers(1, experts))
    x, shares = torch.randn(tokens, hidden, dtype=dtype), torch.rand(tokens, chosen, dtype=dtype)
    indices = torch.rand(tokens, experts).argsort(dim=1)[:, :chosen]
    return layer, lambda module: module(x, indices, shares)


def _recurrent(draw, kind, dtype):
    into, hidden = draw(st.integers(2, 7)), draw(st.integers(3, 7))
    layers = draw(st.integers(1, 2))
    settings = {
        "num_layers": layers,
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    projected = kind == "lstm" and draw(st.booleans())
    if projected:
        settings["proj_size"] = 2
    if kind == "rnn":
        settings["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    layer = RECURRENT_TYPES[kind](into, hidden, **settings)
    form = draw(st.sampled_from(["batch", "alone", "packed", "packed unsorted"]))
    time, batch = draw(st.integers(1, 5)), 1 if form == "alone" else 3
    shape = (batch, time, into) if settings["batch_first"] else (time, batch, into)
    x = torch.randn(shape if form != "alone" else (time, into), dtype=dtype)
    if form.startswith("packed"):
        lengths = torch.tensor([time, max(1, time - 1), 1])
        lengths = lengths[[1, 2, 0]] if "unsorted" in form else lengths
        x = pack_padded_sequence(x, lengths, settings["batch_first"], enforce_sorted="unsorted" not in form)
    state = None
    if draw(st.booleans()):
        count = layers * (2 if settings["bidirectional"] else 1)
        sizes = [2 if projected else hidden, *([hidden] if kind == "lstm" else [])]
        states = [torch.randn(count, *(() if form == "alone" else (batch,)), size, dtype=dtype) for size in sizes]
        state = tuple(states) if kind == "lstm" else states[0]

    def call(module):
        output, last = module(x, state)
        parts = [output.data if isinstance(output, PackedSequence) else output]
        parts += last if isinstance(last, tuple) else [last]
        return torch.cat([part.reshape(-1) for part in parts])

    return layer, call

"""Finding the weights of a network: exactly from its modules, or by evidence from a file's names and shapes."""

import math
import re
from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lrconvert.layers import EXPERT_KINDS, LAYOUTS, Family, Layer, family_of
from lrconvert.layers.attention import SEPARATE
from lrconvert.layers.conv import PADS_ITSELF
from lrconvert.layers.lowrank import full_name

# Subclasses with a forward of their own that computes what their base class does, or what its factors do likewise.
SAME_AS_BASE = frozenset(
    {"timm.layers.linear.Linear", "transformers.models.falcon.modeling_falcon.FalconLinear", PADS_ITSELF}
)

_RECURRENT = re.compile(r"(?:^|\.)(weight_(ih|hh|hr)_l\d+(_reverse)?)$")
_EMBEDDING_NAME = re.compile(r"emb|wte$|wpe$|lookup|^shared$|attention_bias$|codebook", re.IGNORECASE)
_EMBEDDING_REASON = "embedding: a table, factorized only with --include-embeddings or when named"


def layers_of_module(model: nn.Module) -> tuple[Layer, ...]:
    """Every parameter of two or more dimensions in `model`, in the order the modules were registered.

    Shapes are read, never data: a model on the meta device will do. A parameter reached under several names is
    listed once, under its first, and stays dense.
    """
    parents = dict(model.named_modules(remove_duplicate=False))
    names_of = _names_of_parameters(model)
    layers: list[Layer] = []
    listed: set[int] = set()
    for name, module in parents.items():
        parameters = dict(module.named_parameters(recurse=False))
        family = family_of(module)
        shared = next((names for each in module.parameters() if len(names := names_of[id(each)]) > 1), None)
        if family:  # attention owns the weight of a child too
            everything = dict(module.named_parameters())
            parameters |= {path: everything[path] for path in family.weights(module) if path in everything}
        for path, parameter in parameters.items():
            if parameter.dim() < 2 or not parameter.numel() or id(parameter) in listed:
                continue
            listed.add(id(parameter))
            key = f"{name}.{path}" if name else path
            kind, groups, reason, guess = _judge(module, path)
            tied = [other for other in names_of[id(parameter)] if other != key]
            if tied and (guess or not reason):
                reason, guess = f"shared with {_layer_name(tied[0])}", False
            elif shared and family and (guess or not reason):
                reason, guess = f"its module shares {shared[0]} with {shared[-1]}", False
            owners = [parents.get(other.rpartition(".")[0]) for other in tied]
            head = kind == "embedding" and any(isinstance(owner, nn.Linear) for owner in owners)
            shape = tuple(parameter.shape)
            layers.append(Layer(_layer_name(key), key, kind, shape, groups, reason, guess=guess, tied_head=head))
    return tuple(layers)


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of every parameter that is reached under more than one."""
    return [names for names in _names_of_parameters(model).values() if len(names) > 1]


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _judge(module: nn.Module, path: str) -> tuple[str, int, str, bool]:
    """(kind, groups, reason to stay dense, whether naming the layer overrules it) of one parameter of `module`."""
    if isinstance(module, parametrize.ParametrizationList):
        return "parametrized", 1, "parametrized: call torch.nn.utils.parametrize.remove_parametrizations first", False
    if path in ("weight_v", "weight_g"):
        return "parametrized", 1, "weight-normed: call torch.nn.utils.remove_weight_norm first", False
    family = family_of(module)
    groups = family.weights(module).get(path) if family else None
    if family is None or groups is None:
        word = "embedding_bag" if isinstance(module, nn.EmbeddingBag) else "parameter"
        return word, 1, f"{word.replace('_', ' ')}: not the weight of a layer that can be factorized", False
    reason = _reason(module, family)
    if family.kind == "embedding" and not reason:
        return family.kind, groups, _EMBEDDING_REASON, True
    return family.kind, groups, reason, False


def _reason(module: nn.Module, family: Family) -> str:
    """Why a module of `family` cannot be replaced; empty when it can."""
    if not _computes_like(module, family):
        return f"{type(module).__name__} changes what {family.dense.__name__} computes"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or "forward" in vars(module):
        return "has hooks or a forward of its own, which would be lost"
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rescales the entries of the table"
    if isinstance(module, _ConvNd) and module.groups == module.in_channels > 1:
        return "depthwise: one input channel a group, nothing to factorize"
    return ""


def _computes_like(module: nn.Module, family: Family) -> bool:
    """Whether a (subclass of a) dense class still computes as that class does, with its plain weights."""
    own = full_name(type(module)) not in SAME_AS_BASE and any(
        getattr(type(module), name, None) is not getattr(family.dense, name, None)
        for name in ("forward", "_conv_forward")
    )
    if own:
        return False
    parameters, weights = dict(module.named_parameters()), family.weights(module)
    known = {"weight", "bias", *_ATTENTION, *getattr(module, "_flat_weights_names", ())}
    if family.kind in EXPERT_KINDS:
        known = {*weights, *(f"{name}_bias" for name in weights)}
        known |= {name for name in parameters if name.startswith("post_expert_norm.")}
    return all(path in parameters for path in weights) and known.issuperset(module.state_dict())


# What nn.MultiheadAttention holds.
_ATTENTION = ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj.weight", "out_proj.bias", *SEPARATE)


def layers_of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """Every weight of two or more dimensions in a file, its kind guessed from names, shapes and neighbours.

    Args:
        shapes: state-dict key to shape, floating-point tensors only, in the order of the file.

    A guess that could be wrong keeps the layer dense and says what would settle it.
    """
    return tuple(_guesses(shapes))


def _guesses(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layer]:
    previous_out = 0
    in_first = any(_is_stored_in_first(key, shape, shapes) for key, shape in shapes.items())
    for key, shape in shapes.items():
        if len(shape) < 2 or not math.prod(shape):
            continue
        composite = _composite(key, shape, shapes)
        if composite:
            yield Layer(_layer_name(key), key, *composite, evidence="shape")
            continue
        kind, groups, reason, is_guess = _guess(key, shape, shapes, previous_out)
        if in_first and kind == "linear" and _layer_name(key).rpartition(".")[2].startswith("c_"):
            kind = "transposed_linear"  # a square one among GPT-2's c_attn, c_fc and c_proj
        if kind.startswith("conv") and kind in LAYOUTS:
            previous_out = shape[0]
        yield Layer(_layer_name(key), key, kind, shape, groups, reason, evidence="shape", guess=is_guess)


def _composite(
    key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, tuple[int, ...], int] | None:
    """(kind, shape, groups) of a weight that torch's recurrent or attention modules own, known by its key; or None."""
    recurrent = _RECURRENT.search(key)
    if recurrent:
        start, part = key[: recurrent.start(1)], recurrent[2]
        hidden = shapes.get(f"{start}{recurrent[1].replace(f'_{part}_', '_hh_', 1)}", (0, 1))
        projected = f"{start}{recurrent[1].replace(f'_{part}_', '_hr_', 1)}" in shapes
        gates = 4 if projected else hidden[0] // hidden[1]
        if gates not in _RECURRENT_KINDS or (part != "hr" and shape[0] % gates):
            return None
        return _RECURRENT_KINDS[gates], shape, 1 if part == "hr" else gates
    start = key.removesuffix("in_proj_weight")
    if start != key and f"{start}out_proj.weight" in shapes and shape[0] == 3 * shape[1]:
        return "attention", shape, 3
    start, _, last = key.rpartition(".")
    dot = f"{start}." if start else ""
    if last in SEPARATE and f"{dot}out_proj.weight" in shapes:
        return "attention", shape, 1
    if key.endswith("out_proj.weight"):
        start = key.removesuffix("out_proj.weight")
        if any(f"{start}{name}" in shapes for name in ("in_proj_weight", *SEPARATE)):
            return "attention", shape, 1
    return None


_RECURRENT_KINDS = {4: "lstm", 3: "gru", 1: "rnn"}


def _is_stored_in_first(key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the bias beside a weight shows that its outputs are the second dimension."""
    bias = shapes.get(f"{key.removesuffix('weight')}bias")
    return key.endswith("weight") and len(shape) > 1 and bias is not None and bias != shape[:1] and len(bias) == 1


def _guess(
    key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], previous_out: int
) -> tuple[str, int, str, bool]:
    """(kind, groups, reason to stay dense, whether naming the layer overrules it) of one weight in a file."""
    settle = "--model, or --include its name, settles it"
    name = _layer_name(key)
    bias = shapes.get(f"{name}.bias" if name else "bias")
    if not key.endswith("weight") or name == key or not 2 <= len(shape) <= 5:
        return "parameter", 1, "parameter: not the weight of a layer that can be factorized", False
    kind = "linear" if len(shape) == 2 else f"conv{len(shape) - 2}d"
    if bias is not None and _is_stored_in_first(key, shape, shapes):
        if kind == "linear" and bias == shape[1:]:
            return "transposed_linear", 1, "", False
        groups = bias[0] // shape[1]
        if kind != "linear" and groups and bias[0] == groups * shape[1] and shape[0] % groups == 0:
            return kind.replace("conv", "conv_transpose"), groups, "", False
        return "parameter", 1, f"its bias of {bias[0]} fits no layer with this weight", False
    if kind == "linear":
        if bias is None and _EMBEDDING_NAME.search(name.rpartition(".")[2]):
            return "embedding", 1, f"looks like an embedding: {settle}", True
        return kind, 1, "", False
    if shape[1] == 1 and shape[0] > 1:
        return kind, 1, f"depthwise, or a convolution of one input channel: {settle}", True
    if math.prod(shape[2:]) > 1 and previous_out > shape[1] and previous_out % shape[1] == 0:
        # A plain convolution would have as many inputs as the one before it has outputs.
        return kind, 1, f"may be grouped (groups={previous_out // shape[1]}): {settle}", True
    return kind, 1, "", False


def _layer_name(key: str) -> str:
    """The layer's path: "a.b" for "a.b.weight", "" for "weight", and the key itself for any other parameter."""
    return "" if key == "weight" else key.removesuffix(".weight")

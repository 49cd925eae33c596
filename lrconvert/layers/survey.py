"""Finding the weights of a network: exactly from its modules, or by evidence from a file's names and shapes."""

import math
import re
from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.utils import parametrize

from lrconvert.layers import FAMILIES, Layer, family_of

# Parents that use a child's weight without calling the child, so that replacing the child would change nothing or
# break: the class name of the parent, and the children concerned.
READ_BY_PARENT = {
    "MultiheadAttention": ("out_proj",),
    "ShiftedWindowAttention": ("qkv", "proj"),
    "ShiftedWindowAttentionV2": ("qkv", "proj"),
}
NOT_SUPPORTED = "not supported yet"

_RECURRENT = re.compile(r"weight_(ih|hh|hr)_l\d+(_reverse)?$")
_EMBEDDING_NAME = re.compile(r"emb|wte$|wpe$|lookup|^shared$|attention_bias$|codebook", re.IGNORECASE)


def layers_of_module(model: nn.Module) -> tuple[Layer, ...]:
    """Every parameter of two or more dimensions in `model`, in the order the modules were registered.

    Shapes are read, never data: a model on the meta device will do. A parameter reached under several names is
    listed once, under its first, and stays dense.
    """
    parents = dict(model.named_modules(remove_duplicate=False))
    names_of = _names_of_parameters(model)
    layers = []
    listed: set[int] = set()
    for name, module in parents.items():
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if parameter.dim() < 2 or not parameter.numel() or id(parameter) in listed:
                continue
            listed.add(id(parameter))
            kind, groups, reason = _judge(module, key.removeprefix(f"{name}."), parents.get(name.rpartition(".")[0]))
            tied = [other for other in names_of[id(parameter)] if other != key]
            if tied and not reason:
                reason = f"shared with {_layer_name(tied[0])}"
            layers.append(Layer(_layer_name(key), key, kind, tuple(parameter.shape), groups, reason))
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


def _judge(module: nn.Module, parameter: str, parent: nn.Module | None) -> tuple[str, int, str]:
    """(kind, groups, reason to stay dense) of one parameter of `module`, whose own parent is `parent`."""
    if isinstance(module, parametrize.ParametrizationList):
        return "parametrized", 1, "parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    if parameter in ("weight_v", "weight_g"):
        return "parametrized", 1, "weight-normed: call torch.nn.utils.remove_weight_norm first"
    family = family_of(module)
    if family is None or parameter != "weight":
        word = _word_for(module)
        return word, 1, f"{word}: {NOT_SUPPORTED}" if word in _LATER else f"{word}: not a linear or convolution weight"
    groups = int(getattr(module, "groups", 1))
    if not _computes_like(module, family.dense):
        return family.kind, groups, f"{type(module).__name__} changes what {family.dense.__name__} computes"
    if parent is not None:
        child = next((child for child, value in parent._modules.items() if value is module), "")
        if any(child in READ_BY_PARENT.get(base.__name__, ()) for base in type(parent).__mro__):
            return family.kind, groups, f"{type(parent).__name__} reads this weight without calling the layer"
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return family.kind, groups, "has hooks or a forward of its own, which would be lost"
    if groups > 1 and module.weight.shape[1] == 1:  # type: ignore[index]
        return family.kind, groups, "depthwise: one input channel a group, nothing to factorize"
    return family.kind, groups, ""


_LATER = {"recurrent", "attention", "conv_transpose", "embedding"}


def _word_for(module: nn.Module) -> str:
    """A word for the kind of weight that `module` owns, when no family claims it."""
    words: tuple[tuple[str, type[nn.Module] | tuple[type[nn.Module], ...]], ...] = (
        ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
        ("attention", nn.MultiheadAttention),
        ("embedding", (nn.Embedding, nn.EmbeddingBag)),
        ("conv_transpose", nn.modules.conv._ConvTransposeNd),
    )
    return next((word for word, types in words if isinstance(module, types)), "parameter")


def _computes_like(module: nn.Module, dense: type[nn.Module]) -> bool:
    """Whether a (subclass of a) dense class still multiplies its input by its plain weight."""
    own = (getattr(type(module), name, None) for name in ("forward", "_conv_forward"))
    base = (getattr(dense, name, None) for name in ("forward", "_conv_forward"))
    return all(a is b for a, b in zip(own, base, strict=True)) and "weight" in module._parameters


def layers_of_tensors(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """Every weight of two or more dimensions in a file, its kind guessed from names, shapes and neighbours.

    Args:
        shapes: state-dict key to shape, floating-point tensors only, in the order of the file.

    A guess that could be wrong keeps the layer dense and says what would settle it.
    """
    return tuple(_guesses(shapes))


def _guesses(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Layer]:
    previous_out = 0
    for key, shape in shapes.items():
        if len(shape) < 2 or not math.prod(shape):
            continue
        name = _layer_name(key)
        kind, reason, is_guess = _guess(key, shape, shapes, previous_out)
        if kind.startswith("conv") and kind in FAMILIES:
            previous_out = shape[0]
        yield Layer(name, key, kind, shape, dense_reason=reason, evidence="shape", guess=is_guess)


def _guess(
    key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], previous_out: int
) -> tuple[str, str, bool]:
    """(kind, reason to stay dense, whether naming the layer overrules it) of one weight in a file."""
    settle = "--model, or --include its name, settles it"
    name = _layer_name(key)
    prefix = f"{name}." if name else ""
    bias = shapes.get(f"{prefix}bias")
    if _RECURRENT.search(key):
        return "recurrent", f"recurrent: {NOT_SUPPORTED}", False
    if key.endswith("in_proj_weight"):
        return "attention", f"attention: {NOT_SUPPORTED}", False
    if f"{name.removesuffix('out_proj')}in_proj_weight" in shapes and name.endswith("out_proj"):
        return "linear", "MultiheadAttention reads this weight without calling the layer", False
    if not key.endswith("weight") or name == key or not 2 <= len(shape) <= 5:
        return "parameter", "parameter: not a linear or convolution weight", False
    kind = "linear" if len(shape) == 2 else f"conv{len(shape) - 2}d"
    if bias is not None and bias != shape[:1]:
        return "transposed", f"stored input first, as its bias of {bias[0]} says: {NOT_SUPPORTED}", False
    if kind == "linear":
        if bias is None and _EMBEDDING_NAME.search(name.rpartition(".")[2]):
            return "embedding", f"looks like an embedding: {settle}", True
        return kind, "", False
    if shape[1] == 1 and shape[0] > 1:
        return kind, f"depthwise, or a convolution of one input channel: {settle}", True
    if math.prod(shape[2:]) > 1 and previous_out > shape[1] and previous_out % shape[1] == 0:
        # A plain convolution would have as many inputs as the one before it has outputs.
        return kind, f"may be grouped (groups={previous_out // shape[1]}): {settle}", True
    return kind, "", False


def _layer_name(key: str) -> str:
    """The layer's path: "a.b" for "a.b.weight", "" for "weight", and the key itself for any other parameter."""
    return "" if key == "weight" else key.removesuffix(".weight")

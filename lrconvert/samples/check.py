"""Whether a network can be called with what was read, as far as that can be told without running it."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lrconvert.cost import observe
from lrconvert.errors import UsageError
from lrconvert.inputs import Call, Input
from lrconvert.network import Network


def checked(calls: Sequence[Call], network: Network, where: str) -> tuple[Call, ...]:
    """`calls` as the network takes them: whole numbers as int64, and the batch in the dimension where it belongs.

    Names are compared with the signature of the model's forward; shapes, kinds and ranges with the network's inputs
    where they are known; then one call is made on the meta device, where nothing is computed.

    Args:
        calls: the first dimension of every tensor is the batch.
        network: what is to be called.
        where: the calls come from, for messages.

    Raises:
        UsageError: the network cannot be called with them.
    """
    for call in calls:
        for wanted, name, tensor in _pairs(call, network, where):
            _check(tensor, wanted, f"{where}: {name}")
    # A network that could not be traced fails on the meta device with anything.
    if network.module is not None and network.trace is not None:
        # The last, since texts are in order of their length.
        _try(network.module, calls[-1], network, where)
    return tuple(_placed(call, network) for call in calls)


def _arguments(call: Call, module: nn.Module | None, where: str) -> tuple[dict[str, Tensor], bool]:
    """(the tensors of `call` by the names that forward has for them, whether they can be passed by these names)."""
    if module is None:
        return {f"input {number}": tensor for number, tensor in enumerate(call.args)} | call.kwargs, False
    try:
        bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        given = ", ".join((*("a tensor" for _ in call.args), *call.kwargs))
        raise UsageError(f"{where}: gives {given}, but the model cannot be called so: {error}") from None
    tensors: dict[str, Tensor] = {}
    all_named = True
    for name, value in bound.arguments.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            tensors |= value
        else:
            all_named = False
            tensors |= {f"{name}[{number}]": tensor for number, tensor in enumerate(value)}
    return tensors, all_named


def _pairs(call: Call, network: Network, where: str) -> list[tuple[Input, str, Tensor]]:
    """Every input that is known of the network, with the name and tensor that `call` gives it."""
    tensors, _ = _arguments(call, network.module, where)
    inputs = network.inputs or ()
    if network.module is not None and inputs and inputs[0].name is not None:
        return [(each, each.name, tensors[each.name]) for each in inputs if each.name in tensors]
    return [(each, name, tensor) for each, (name, tensor) in zip(inputs, tensors.items(), strict=False)]


def _check(tensor: Tensor, wanted: Input, what: str) -> None:
    """Raise UsageError where the tensor differs from the input in more than its sizes."""
    if tensor.ndim != len(wanted.shape) + 1:
        fix = ": put a dimension for the batch in front" if tensor.ndim == len(wanted.shape) else ""
        raise UsageError(f"{what} has shape {tuple(tensor.shape)}, but the model takes {_shape(wanted)}{fix}")
    kind = str(tensor.dtype).removeprefix("torch.")
    if wanted.kind == "float":
        if not tensor.is_floating_point():
            raise UsageError(
                f"{what} holds {kind}, but the model takes floating-point numbers: scale and normalize them as it was "
                "trained on them"
            )
        if not tensor.isfinite().all():
            raise UsageError(f"{what} holds NaN or infinite values: leave those examples out")
    elif wanted.kind == "index":
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise UsageError(f"{what} holds {kind}, but the model takes whole numbers below {wanted.high}: give int64")
        low, high = (int(each) for each in tensor.aminmax()) if tensor.numel() else (0, 0)
        if low < 0 or high >= wanted.high:
            raise UsageError(
                f"{what} holds {low if low < 0 else high}, but the model takes 0 to {wanted.high - 1}: make them with "
                "the model's own tokenizer or vocabulary"
            )


def _shape(wanted: Input) -> str:
    return f"(examples, {', '.join(map(str, wanted.shape))})"


def _placed(call: Call, network: Network) -> Call:
    """`call` with int64 for whole numbers, and the batch where the network's inputs have it."""
    call = call.changed(_as_int64)
    dims = {each.name: each.batch_dim for each in network.inputs or ()}
    if not any(dims.values()):
        return call
    order = [each.batch_dim for each in network.inputs or ()] + [0] * len(call.args)
    args = tuple(tensor.movedim(0, dim) for tensor, dim in zip(call.args, order, strict=False))
    kwargs = {name: tensor.movedim(0, dims.get(name, 0)) for name, tensor in call.kwargs.items()}
    return Call(args, kwargs, call.size)


def _as_int64(tensor: Tensor) -> Tensor:
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.long() if whole else tensor


def _try(module: nn.Module, call: Call, network: Network, where: str) -> None:
    """Raise UsageError when `module` fails on the meta device with tensors of the shapes in `call`."""
    tensors, all_named = _arguments(call, module, where)
    known = {name: wanted for wanted, name, _ in _pairs(call, network, where)}
    # Masks are looked into, which fails where there is no data.
    shown = {name: tensor for name, tensor in tensors.items() if name not in known or known[name].kind != "mask"}
    if (not all_named and call.kwargs) or any(tensor.dtype == torch.bool for tensor in shown.values()):
        return
    given = tuple(
        Input(
            tuple(tensor.shape[1:]),
            name if all_named else None,
            "float" if tensor.is_floating_point() else "index",
            batch_dim=known[name].batch_dim if name in known else 0,
        )
        for name, tensor in shown.items()
    )
    try:
        observe(module, given, call.size, (), lambda *call: None)
    except Exception as error:
        # Whatever the model's own code raises for inputs that it cannot take.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        takes = ", ".join(f"{each.name or ''} {_shape(each)}".strip() for each in network.inputs or ())
        fix = next((fix for wanted, _, tensor in _pairs(call, network, where) if (fix := _fix(tensor, wanted))), "")
        raise UsageError(f"{where}: the model takes {takes}, and not {shapes}: {reason}{fix}") from error


def _fix(tensor: Tensor, wanted: Input) -> str:
    """What to do about images (examples, C, H, W) of other sizes than `wanted`; empty for anything else."""
    if wanted.kind != "float" or len(wanted.shape) != 3:
        return ""
    channels, height, width = wanted.shape
    if tensor.shape[1] != channels:
        return f"; give images of {channels} channels, or a model that is built for {tensor.shape[1]}"
    return f"; set img_size, for images of {height}×{width}" if tensor.shape[2:] != (height, width) else ""

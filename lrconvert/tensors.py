"""A tensor that has not been read yet: what everything that streams a checkpoint passes around; and loading them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lrconvert.errors import WeightError

# Running statistics and counters: state, but not parameters.
_BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked", "position_ids", "relative_position_index")


@dataclass(frozen=True)
class TensorRef:
    """Shape and dtype of a tensor, and how to get its data.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: returns the tensor on the CPU, contiguous, fresh each time for files.
        alias_of: the key of another tensor that shares this one's memory, if any.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    alias_of: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


def refs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorRef]:
    """References to tensors that are in memory already; those that share memory are marked."""
    refs: dict[str, TensorRef] = {}
    seen: dict[tuple[object, ...], str] = {}
    for key, tensor in tensors.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        shared = tensor.numel() > 0 and tensor.device.type != "meta"
        alias = seen.setdefault(place, key) if shared else key
        refs[key] = TensorRef(
            tuple(tensor.shape),
            tensor.dtype,
            lambda tensor=tensor: tensor.detach().cpu().contiguous(),  # type: ignore[misc]
            None if alias == key else alias,
        )
    return refs


def converted_dtype(before: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of the dtype `before` is converted to: floating-point numbers of 8 bits have scales, and stay."""
    return dtype if before.is_floating_point and before.itemsize > 1 else before


def converted(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """`tensor` in `converted_dtype`.

    Raises:
        WeightError: a number is finite, but too large for `dtype`; `key` is named in the message.
    """
    found = tensor.to(converted_dtype(tensor.dtype, dtype))
    if found.dtype != tensor.dtype and bool((found.isfinite() != tensor.isfinite()).any()):
        largest = float(tensor[tensor.isfinite()].abs().max())
        raise WeightError(f"{key}: {largest:.3g} is too large for {str(dtype).removeprefix('torch.')}; use bfloat16")
    return found


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], assign: bool = False) -> None:
    """Strict `load_state_dict` of tensors that do not say which version of each module's layout they are in.

    Some modules refuse a state dict without versions (torchvision's MNASNet). With the very keys of the model it is in
    the current one; with others, say of a BatchNorm without a counter, modules may bring it up to date.
    """
    state, current = OrderedDict(tensors), model.state_dict()
    if state.keys() == current.keys():
        state._metadata = current._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state, strict=True, assign=assign)


def shapes_of(tensors: Mapping[str, TensorRef]) -> dict[str, tuple[int, ...]]:
    """Key to shape."""
    return {key: ref.shape for key, ref in tensors.items()}


def relative_difference(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64; ‖got‖ where `want` is zero."""
    difference = torch.linalg.vector_norm(got.double() - want.double())
    size = torch.linalg.vector_norm(want.double())
    return float(difference / size) if size else float(difference)


def count_parameters(tensors: Mapping[str, TensorRef]) -> int:
    """Parameters in a state dict: real and complex tensors that are not known buffers, shared ones counted once."""
    return sum(
        ref.numel
        for key, ref in tensors.items()
        if (ref.dtype.is_floating_point or ref.dtype.is_complex)
        and not ref.alias_of
        and not key.endswith(_BUFFER_NAMES)
    )

"""What several verbs share."""

import torch

from lrconvert.checkpoints import WRITTEN_BY, Header
from lrconvert.errors import UsageError
from lrconvert.images import ImagePreparation
from lrconvert.inputs import shape_of
from lrconvert.network import Network
from lrconvert.plan import Plan


def resolve_device(name: str) -> torch.device:
    """The device behind "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        UsageError: torch does not know it, or this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device '{name}': this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def header_for(network: Network, plan: Plan | None, notes: tuple[str, ...] = ()) -> Header:
    """The header of a file made from `network`; what an earlier header knew is kept, and `notes` are added."""
    before = network.checkpoint.header if network.checkpoint else None
    architecture = network.architecture
    return Header(
        written_by=WRITTEN_BY,
        model=architecture.name if architecture else before.model if before else None,
        model_args=dict(architecture.args) if architecture else before.model_args if before else {},
        input_shape=shape_of(network.inputs) or (before.input_shape if before else None),
        images=network.images if network.images != ImagePreparation() else None,
        parameters=(before.parameters if before else None) or network.num_params,
        macs=(before.macs if before else None) or (network.trace.macs if network.trace else None),
        plan=plan,
        notes=((before.notes if before and plan else ()) + notes),
    )

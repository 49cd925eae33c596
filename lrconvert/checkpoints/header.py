"""What lrconvert writes about itself into every file: one JSON string under the key `lrconvert`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lrconvert import __version__
from lrconvert.errors import CheckpointError
from lrconvert.images import ImagePreparation
from lrconvert.plan import Plan

KEY = "lrconvert"
WRITTEN_BY = f"lrconvert {__version__}"


class Header(BaseModel):
    """Everything needed to rebuild a model around the tensors of a file.

    Attributes:
        version: of this format.
        written_by: "lrconvert 0.1.0".
        model: where the architecture comes from ("torchvision/resnet50"), if it was named.
        model_args: keyword arguments of that architecture.
        input_shape: shape of one input without the batch, where it is known.
        images: how to prepare images for the network, where it was trained on some.
        parameters: parameters of the dense network, to say by how much this one is smaller.
        macs: multiply-accumulates of the dense network for one input, where they were counted.
        shared: key to the key of the tensor that it shares its memory with; such tensors are stored once.
        plan: which layers are factorized, and how; None for a dense file.
        notes: what else was done to the factors: on which examples they were calibrated, whether they were fitted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    version: Literal[1] = 1
    written_by: str = ""
    model: str | None = None
    model_args: dict[str, Any] = {}
    input_shape: tuple[int, ...] | None = None
    images: ImagePreparation | None = None
    parameters: int | None = None
    macs: int | None = None
    shared: dict[str, str] = {}
    plan: Plan | None = None
    notes: tuple[str, ...] = ()


def read_header(metadata: Mapping[str, Any] | None, where: str) -> Header | None:
    """The header among the metadata of a file, or None when lrconvert did not write it.

    Raises:
        CheckpointError: there is a header, but it cannot be understood.
    """
    text = (metadata or {}).get(KEY)
    if not isinstance(text, str):
        return None
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{where}: its lrconvert header cannot be read ({field}: {first['msg']}); "
            "a newer lrconvert may have written it"
        ) from None

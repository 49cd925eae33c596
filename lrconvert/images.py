"""How images are prepared for a network: what it was trained on, as files say it."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

# Files in a folder, the entry that matters in each (None for all of it), and what they call mean and std.
_SAID_BY = (
    ("preprocessor_config.json", None, "image_mean", "image_std"),  # transformers
    ("config.json", "pretrained_cfg", "mean", "std"),  # timm
)


class ImagePreparation(BaseModel):
    """How images were prepared that a network was trained on.

    Attributes:
        img_size: height and width that they were brought to; None if they were left as they are, or nothing says it.
        mean, std: that each channel of images from 0 to 1 was normalized by; None where nothing says it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    img_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def images_in(folder: Path) -> ImagePreparation:
    """What a folder of transformers or timm says of mean and std; nothing where it does not say it."""
    for file, entry, mean, std in _SAID_BY:
        content = _read(folder / file)
        said = content.get(entry) if entry is not None else content
        if isinstance(said, dict) and said.get("do_normalize", True) and said.get(mean) and said.get(std):
            try:
                return ImagePreparation(mean=said[mean], std=said[std])
            except ValidationError:
                continue
    return ImagePreparation()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

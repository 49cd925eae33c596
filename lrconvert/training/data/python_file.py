"""Data of the user's own: "path/to/file.py:factory", a function that returns datasets."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lrconvert.errors import LrconvertError
from lrconvert.models.python_file import import_callable
from lrconvert.training.data.images import Splits, UserImages

PARTS = ("train", "validation", "test")


def user_data(file: str, factory: str, args: Mapping[str, Any]) -> Splits:
    """What `factory` of the Python file `file` returns; the file is imported, and so run.

    It returns (train, validation or None, test or None), or a dict with those keys, of which only "train" must be
    there, and optionally "num_classes". Each is a dataset with a length, of pairs (image tensor (C, H, W), label): a
    uint8 image is scaled to 0 … 1, a float one is taken as it is. Without "num_classes" every training sample is read
    once, to find the largest label. What a dataset draws from torch's global generator repeats with seed, epoch and
    sample; what it draws from elsewhere does not.

    Raises:
        LrconvertError: the file is missing or fails, or returns something else.
    """
    return splits_of(f"{file}:{factory}", made_by(file, factory, args))


def made_by(file: str, factory: str, args: Mapping[str, Any]) -> Any:
    """What `factory` of the Python file `file` returns, whatever it is.

    Raises:
        LrconvertError: the file is missing or fails.
    """
    make, _ = import_callable(file, factory, LrconvertError, "a dataset")
    try:
        return make(**args)
    except (Exception, SystemExit) as error:
        raise LrconvertError(f"{file}:{factory}: fails: {type(error).__name__}: {error}") from error


def splits_of(name: str, made: Any) -> Splits:
    """The datasets that the factory `name` made; see `user_data`.

    Raises:
        LrconvertError: it made something else.
    """
    given = _as_dict(name, made)
    parts = [_checked(f"{name}: {part}", given.get(part)) for part in PARTS]
    train = parts[0]
    if train is None:
        raise LrconvertError(f"{name}: returned no dataset to train on")
    num_classes = given.get("num_classes") or 1 + max(train[index][1] for index in range(len(train)))
    return Splits(train, parts[1], parts[2], int(num_classes))


def _as_dict(name: str, made: Any) -> Mapping[str, Any]:
    if isinstance(made, Mapping) and set(made) <= {*PARTS, "num_classes"}:
        return made
    if isinstance(made, tuple | list) and len(made) == len(PARTS):
        return dict(zip(PARTS, made, strict=True))
    what = f"a dict with {', '.join(map(str, made))}" if isinstance(made, Mapping) else type(made).__name__
    raise LrconvertError(
        f"{name}: returned {what}, not (train, validation or None, test or None), "
        "nor a dict with those keys and num_classes"
    )


def _checked(name: str, dataset: Any) -> UserImages | None:
    """The dataset, if it has samples of the right kind; None for none."""
    if dataset is None:
        return None
    try:
        images = UserImages(dataset, range(len(dataset)))
        image, _ = images[0]
    except (IndexError, TypeError, ValueError) as error:
        raise LrconvertError(f"{name}: not a dataset of (image tensor, label): {error}") from error
    if not isinstance(image, Tensor) or image.ndim != 3:
        shape = f"of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise LrconvertError(f"{name}: an image must be a tensor (C, H, W), not {shape}")
    return images

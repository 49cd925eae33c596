"""Calls with what a function of the user's returns: "path/to/file.py:factory"."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lrconvert.errors import LrconvertError
from lrconvert.inputs import Call
from lrconvert.network import Network
from lrconvert.samples.images import ImageSettings, image_calls
from lrconvert.samples.wanted import Found, Wanted, are_inputs, as_call, cut, part
from lrconvert.training.data import open_made
from lrconvert.training.data.python_file import PARTS, made_by


def read_factory(file: str, factory: str, network: Network, wanted: Wanted, settings: ImageSettings) -> Found:
    """Inputs that `factory` of the Python file `file` makes; the file is imported, and so run.

    What it returns says what it is:

    - a tensor, a tuple or a dict of tensors: all inputs at once, as a .pt file holds them; the first dimension of each
      tensor is the examples;
    - the datasets of (image, label) that the trainer takes, see `lrconvert.training.data.python_file.user_data`:
      images to train on, chosen at random, without their labels;
    - any other iterable, such as a list, a generator or a DataLoader: batches of inputs, each a tensor, a tuple or
      list, or a dict of tensors, taken in order until there are enough.

    Raises:
        LrconvertError: the file is missing or fails, or returns something else.
    """
    name = f"{file}:{factory}"
    made = made_by(file, factory, {})
    if are_inputs(made):
        whole = as_call(made, name)
        chosen = wanted.choose(whole.size, name)
        calls = tuple(cut(part(whole, chosen), wanted.batch_size))
        return Found(calls, f"{len(chosen):,} examples of {name}, out of {whole.size:,}")
    if _are_datasets(made):
        dataset = open_made(name, made, img_size=settings.img_size, mean=settings.mean, std=settings.std)
        return image_calls(dataset.train, network, wanted, name)
    if not isinstance(made, Iterable) and not hasattr(made, "__getitem__"):
        raise LrconvertError(f"{name}: returned an object of type {type(made).__name__}, which has no inputs in it")
    calls = tuple(_taken(made, wanted, name))
    if not calls:
        skipped = f" after the {wanted.skip:,} that are skipped" if wanted.skip else ""
        raise LrconvertError(f"{name}: returned no inputs{skipped}")
    return Found(calls, f"{sum(call.size for call in calls):,} examples of {name}, the first{_after(wanted)}")


def _after(wanted: Wanted) -> str:
    return f" after {wanted.skip:,}" if wanted.skip else ""


def _are_datasets(made: Any) -> bool:
    """Whether it is what the trainer takes, or was meant to be; batches of inputs are neither."""
    if isinstance(made, Mapping):
        return True
    parts = made if isinstance(made, tuple | list) and len(made) == len(PARTS) else ()
    return bool(parts) and not are_inputs(_as_tuple(parts[0]))


def _taken(batches: Iterable[Any], wanted: Wanted, name: str) -> Iterator[Call]:
    """Calls with the examples number `skip` to `skip + count` of all batches."""
    skip, left = wanted.skip, wanted.count
    for number, batch in enumerate(_reading(batches, name)):
        inputs = _as_tuple(batch)
        if not are_inputs(inputs):
            raise LrconvertError(
                f"{name}: batch {number} is {_described(batch)}; it must be a tensor, or a tuple or dict of tensors"
            )
        call = as_call(inputs, f"{name}: batch {number}")
        rest = part(call, slice(skip, skip + left)) if skip < call.size else None
        skip -= min(skip, call.size)
        if rest is not None:
            left -= rest.size
            yield from cut(rest, wanted.batch_size)
        if not left:
            return


def _reading(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches; whatever the user's code raises in one line."""
    try:
        yield from batches
    except LrconvertError:
        raise
    except Exception as error:
        raise LrconvertError(f"{name}: fails: {type(error).__name__}: {error}") from error


def _as_tuple(batch: Any) -> Any:
    """A list, as which DataLoaders return tuples, as a tuple; anything else as it is."""
    return tuple(batch) if isinstance(batch, list) else batch


def _described(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(type(each).__name__ for each in batch) or 'nothing'}"
    return f"an object of type {type(batch).__name__}"

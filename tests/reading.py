"""Reading datasets whole, or not at all."""

import pytest
import torch

from lrconvert.errors import LrconvertError
from lrconvert.training.data import Loader, open_dataset


def everything(source, workers=0):
    batches = list(Loader(source, batch_size=16, seed=0, workers=workers).once())
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


def fails(match, *arguments, error=LrconvertError, **options):
    with pytest.raises(error, match=match) as caught:
        open_dataset(*arguments, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)

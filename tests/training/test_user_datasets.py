"""Datasets that a function in a file of the user's returns."""

import pytest
import torch
from reading import everything, fails

from lrconvert.errors import LrconvertError
from lrconvert.training.data import Augment, Loader, open_dataset

USERS = """
import torch
from torch.utils.data import TensorDataset


class Noisy:
    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 12:
            raise IndexError
        return torch.rand(3, 4, 4), torch.tensor(index % 5)


def three(n=20):
    bytes_ = TensorDataset(torch.full((n, 1, 6, 5), 51, dtype=torch.uint8), torch.arange(n) % 4)
    return bytes_, None, bytes_


def named():
    return {"train": Noisy(), "validation": Noisy(), "num_classes": 7}


def wrong():
    return {"train": Noisy(), "vali": Noisy()}


def pictures():
    return [("a picture", 0)], None, None


def nothing():
    return None, None, None


def sizes():
    return [(torch.ones(1, 4 + number % 2, 4), 0) for number in range(10)], None, None


def broken():
    raise KeyError("oops")
"""


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.py"
    path.write_text(USERS)
    return str(path)


def test_a_tuple_of_datasets_from_a_file(users):
    found = open_dataset(f"{users}:three", args={"n": 30}, mean=[0.1], std=[0.5])
    assert [len(source) for source in (found.train, found.validation, found.test)] == [27, 3, 30]
    assert (found.num_classes, found.input_shape) == (4, (1, 6, 5))
    images, labels = everything(found.test)
    assert torch.allclose(images, torch.full((30, 1, 6, 5), (0.2 - 0.1) / 0.5))
    assert labels.equal(torch.arange(30) % 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dict_of_datasets_whose_own_draws_repeat(users, workers):
    found = open_dataset(f"{users}:named", augment=Augment(crop_padding=1, hflip=0.5))
    assert (found.num_classes, len(found.validation), found.test) == (7, 12, None)
    drawn = [
        next(Loader(found.train, batch_size=12, seed=0, workers=here).epoch(epoch))[0]
        for epoch, here in ((0, 0), (0, workers), (1, workers))
    ]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    assert everything(found.validation)[0].equal(everything(found.validation, workers)[0])


def test_what_a_file_may_not_return_is_told(users):
    fails("returned a dict with train, vali, not", f"{users}:wrong")
    fails(r"train: an image must be a tensor \(C, H, W\), not str", f"{users}:pictures")
    fails("returned no dataset to train on", f"{users}:nothing")
    fails("broken: fails: KeyError: 'oops'", f"{users}:broken")
    fails("has no callable 'thre'; it has: ", f"{users}:thre")
    fails("no such file; a dataset takes path/to/file.py:factory", "nowhere.py:three")
    found = open_dataset(f"{users}:sizes")
    with pytest.raises(LrconvertError, match=r"of one batch have shapes .* set img_size"):
        everything(found.train)
    assert everything(open_dataset(f"{users}:sizes", img_size=8).train)[0].shape == (9, 1, 8, 8)

"""What a function of the user's may return, and how it is told what it returned."""

import pytest
import torch

from lrconvert.errors import LrconvertError, UsageError
from lrconvert.network import open_network
from lrconvert.samples import read_samples

USERS = """
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

x = torch.arange(30.0)[:, None]
read = []


def tensor():
    return x


def pair():
    return x, -x


def named():
    return {"left": x, "right": -x}


def loader():
    return DataLoader(TensorDataset(x, -x), batch_size=7)


def dicts():
    for start in range(0, 30, 4):
        read.append(start)
        yield {"left": x[start : start + 4]}


def three():
    return [x[:10], x[10:20], x[20:]]


class Batches:
    def __getitem__(self, index):
        if index == 3:
            raise IndexError
        return x[10 * index : 10 * index + 10]


def sequence():
    return Batches()


def endless():
    while True:
        yield x


class Labelled(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((1, 2, 2), index / 10), index % 3


def datasets():
    return Labelled(), None, None


def dataset_dict():
    return {"train": Labelled(), "validation": Labelled(), "num_classes": 3}


def labelled_batches():
    return DataLoader(Labelled(), batch_size=4)


def nothing():
    return []


def number():
    return 3


def words():
    return ["a", "b"]


def mixed():
    yield x
    yield {"left": 3}


def broken():
    yield x[:1]
    raise KeyError("oops")


def wrong_dict():
    return {"training": x, "n": 3}
"""


class Sum(torch.nn.Module):
    """One input or two."""

    def forward(self, left, right=None):
        return left if right is None else left + right


@pytest.fixture
def users(tmp_path):
    path = tmp_path / "users.py"
    path.write_text(USERS)
    return str(path)


@pytest.fixture
def network():
    return open_network(Sum())


def first_column(samples):
    return [int(value) for call in samples.calls for value in call.tensors[0].flatten(1)[:, 0]]


@pytest.mark.parametrize("factory", ["tensor", "pair", "named"])
def test_all_inputs_at_once_are_chosen_from(users, network, factory):
    samples = read_samples(f"{users}:{factory}", network, count=20, batch_size=8)
    values = first_column(samples)
    assert len(set(values)) == 20
    assert values != sorted(values)
    assert samples.notes == (f"20 examples of {users}:{factory}, out of 30",)
    if factory != "tensor":
        assert all(not call.run(Sum()).any() for call in samples.calls)
    assert [len(call.kwargs) for call in samples.calls] == [2 if factory == "named" else 0] * 3


@pytest.mark.parametrize("factory", ["loader", "dicts", "three", "sequence", "endless"])
def test_batches_are_taken_as_they_come(users, network, factory):
    whole = read_samples(f"{users}:{factory}", network, count=25, batch_size=5)
    assert first_column(whole) == list(range(25))
    assert all(call.size == len(call.tensors[0]) <= 5 for call in whole.calls)
    rest = read_samples(f"{users}:{factory}", network, count=4, skip=9)
    assert first_column(rest) == [9, 10, 11, 12]
    assert rest.notes == (f"4 examples of {users}:{factory}, the first after 9",)


def test_no_more_batches_are_read_than_needed(users, network):
    import sys

    read_samples(f"{users}:dicts", network, count=8)
    assert sys.modules["_lrconvert_user_users"].read == [0, 4]


@pytest.mark.parametrize("factory", ["datasets", "dataset_dict"])
def test_datasets_of_the_trainer_give_images_to_train_on(users, factory):
    network = open_network(torch.nn.Conv2d(1, 2, 2))
    samples = read_samples(f"{users}:{factory}", network, mean=[0.1], std=[0.5])
    values = torch.cat([call.args[0] for call in samples.calls])[:, 0, 0, 0]
    numbers = ((values * 0.5 + 0.1) * 10).round().int().tolist()
    # Where no validation images are named, a tenth is held out.
    assert len(set(numbers)) == len(numbers) == (18 if factory == "datasets" else 20)


def test_what_cannot_be_read_is_told(users, network):
    def fails(factory, match, error=LrconvertError, **settings):
        with pytest.raises(error, match=match) as caught:
            read_samples(f"{users}:{factory}", network, **settings)
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)

    fails("nothing", "returned no inputs")
    fails("three", "returned no inputs after the 30 that are skipped", skip=30)
    fails("number", "returned an object of type int")
    fails("words", "batch 0 is an object of type str; it must be a tensor")
    fails("mixed", "batch 1 is an object of type dict")
    fails("broken", "broken: fails: KeyError: 'oops'")
    fails("wrong_dict", "returned a dict with training, n, not")
    fails("absent", "has no callable 'absent'; it has: .*tensor")
    with pytest.raises(LrconvertError, match="no such file"):
        read_samples("nowhere.py:tensor", network)


def test_labels_among_the_inputs_are_refused(users):
    network = open_network(torch.nn.Conv2d(1, 2, 2))
    with pytest.raises(UsageError, match="gives a tensor, a tensor, but the model cannot be called so: too many"):
        read_samples(f"{users}:labelled_batches", network)

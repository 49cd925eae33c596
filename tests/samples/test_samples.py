"""Which examples are taken, and what is said of data that is not there."""

import numpy as np
import pytest
import torch

from lrconvert.errors import LrconvertError, UnknownNameError, UsageError
from lrconvert.network import open_network
from lrconvert.samples import read_samples


@pytest.fixture
def network():
    return open_network(torch.nn.Linear(1, 1))


@pytest.fixture
def numbers(tmp_path):
    """A file of a hundred examples, each of which is its own number."""
    path = tmp_path / "numbers.npy"
    np.save(path, np.arange(100, dtype=np.float32)[:, None])
    return str(path)


def values(samples):
    return [int(value) for call in samples.calls for value in call.args[0]]


def test_choices_that_skip_each_other_are_disjoint_and_cover_everything(network, numbers):
    first = values(read_samples(numbers, network, count=60))
    rest = values(read_samples(numbers, network, count=60, skip=60))
    assert (len(first), len(rest)) == (60, 40)
    assert sorted(first + rest) == list(range(100))
    assert values(read_samples(numbers, network, count=20, skip=30)) == first[30:50]


def test_the_seed_chooses(network, numbers):
    first, again, other = (values(read_samples(numbers, network, count=50, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)


def test_fewer_examples_than_asked_for_are_noted_and_none_is_an_error(network, numbers):
    assert read_samples(numbers, network, count=100).notes == (f"100 examples of {numbers}, out of 100",)
    few = read_samples(numbers, network, count=101)
    assert few.notes[1:] == (f"101 examples were asked for, but {numbers} has 100",)
    few = read_samples(numbers, network, count=50, skip=90)
    assert few.size == 10
    assert few.notes[1:] == (f"50 examples were asked for, but {numbers} has 10 after the 90 that were skipped",)
    with pytest.raises(LrconvertError, match=r"has 100 examples, and 100 are skipped"):
        read_samples(numbers, network, skip=100)


def test_calls_are_no_larger_than_asked(network, numbers):
    found = read_samples(numbers, network, count=30, batch_size=7)
    assert [call.size for call in found.calls] == [7, 7, 7, 7, 2]
    assert [len(call.args[0]) for call in found.calls] == [7, 7, 7, 7, 2]


@pytest.mark.parametrize(("name", "value"), [("count", 0), ("batch_size", 0), ("skip", -1)])
def test_numbers_out_of_range(network, numbers, name, value):
    with pytest.raises(UsageError, match=f"{name} must be at least {value + 1}, not {value}"):
        read_samples(numbers, network, **{name: value})


def test_data_that_is_not_there(network, tmp_path):
    with pytest.raises(UnknownNameError, match=r"unknown data 'digit': did you mean 'digits'\? known: .*a text file"):
        read_samples("digit", network)
    for name in (f"{tmp_path}/none", "none.npz", "none.txt"):
        with pytest.raises(LrconvertError, match="no such file or folder"):
            read_samples(name, network)

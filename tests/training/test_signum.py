"""Votes on signs, as bits and by hand."""

import pytest
import torch
from torch import nn

from lrconvert.errors import UsageError
from lrconvert.training.optimizers import Signum
from lrconvert.training.signum import majority, pack_signs, signs


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 77])
@pytest.mark.parametrize("voters", [1, 2, 3, 300])
def test_votes_are_counted_from_bits(count, voters):
    momenta = torch.randn(voters, count)
    packed = torch.stack([pack_signs(momentum) for momentum in momenta])
    assert packed.shape == (voters, -(-count // 8))
    assert torch.equal(majority(packed, count), momenta.sign().sum(0).sign().int())


def test_the_first_element_is_the_lowest_bit_and_padding_is_zero():
    assert pack_signs(torch.tensor([1.0, -1, -1, -1, -1, -1, -1, 1, -1, 1])).tolist() == [0b10000001, 0b10]


def test_zero_counts_as_positive():
    assert signs(torch.tensor([-2.0, 0.0, 1e-30])).tolist() == [-1, 1, 1]


def test_signum_optimizer_by_hand():
    parameter = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = Signum([parameter], lr=0.5, momentum=0.5, weight_decay=0.25)
    parameter.grad = torch.tensor([4.0, -4.0])
    optimizer.step()  # m = (2, −2): p − 0.5·((1, −1) + 0.25·p)
    assert parameter.tolist() == [1.25, -0.375]
    parameter.grad = torch.tensor([-1.0, 8.0])
    assert optimizer.step(lambda: 7.0) == 7.0  # m = (0.5, 3)
    assert parameter.tolist() == [0.59375, -0.828125]


def test_signum_optimizer_refuses_what_makes_no_sense():
    for bad in ({"lr": -1}, {"lr": 1, "momentum": 1}, {"lr": 1, "weight_decay": -1}):
        with pytest.raises(UsageError, match="Signum needs"):
            Signum([nn.Parameter(torch.zeros(1))], **bad)

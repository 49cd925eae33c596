"""Mixup and cutmix: targets say how much of which image there is to see."""

import pytest
import torch
from helpers import assert_close

from lrconvert.errors import UsageError
from lrconvert.training.mixing import Mixer

N = 12


def one_channel_an_image(side=16):
    """Image i is 1 in channel i and 0 elsewhere, so that a channel's mean tells how much of an image is to be seen."""
    return torch.eye(N)[:, :, None, None].expand(-1, -1, side, side).contiguous(), torch.arange(N)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_targets_are_the_shares_of_the_images(mixup, cutmix):
    mixer = Mixer(N, mixup, cutmix)
    assert mixer
    mixed = False
    for _ in range(20):
        images, targets = mixer(*one_channel_an_image())
        shares = images.mean((2, 3))
        assert_close(targets, shares)
        assert_close(targets.sum(1), torch.ones(N))
        mixed |= bool((shares.amax(1) < 1).any())
    assert mixed


def test_cutmix_is_chosen_as_often_as_asked():
    mixer = Mixer(N, 0.8, 1.0, switch_prob=0.3)
    # Cutmix moves pixels and blends none.
    cut = sum(
        bool(((images == 0) | (images == 1)).all())
        for images, _ in (mixer(*one_channel_an_image(4)) for _ in range(1000))
    )
    assert abs(cut - 300) < 5 * (1000 * 0.3 * 0.7) ** 0.5


def test_nothing_to_mix():
    mixer = Mixer(4, 0, 0)
    assert not mixer
    images = torch.rand(2, 3, 4, 4)
    got, targets = mixer(images, torch.tensor([1, 3]))
    assert got is images
    assert_close(targets, torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))


def test_values_out_of_range_are_refused():
    with pytest.raises(UsageError, match="must not be negative, not -1"):
        Mixer(10, -1, 0)
    with pytest.raises(UsageError, match="switch_prob must be from 0 to 1, not 2"):
        Mixer(10, 1, 1, switch_prob=2)

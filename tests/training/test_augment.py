"""Augmentation settings, and the transforms that they name."""

import pytest
import torch

from lrconvert.errors import UsageError
from lrconvert.training.data.augment import Augment, Framing, Normalization, automatic, image_transform

PLAIN = Normalization((0.0,) * 3, (1.0,) * 3)


def test_timms_notation_gives_each_operation_a_noisy_step_and_leaves_some_out():
    transform = automatic("rand-m5-n3-mstd1-p0.7")
    steps = []
    transform.by_step = [lambda image, step=step: steps.append(step) or image for step in range(31)]
    for _ in range(2000):
        transform(None)
    drawn = torch.tensor(steps).double()
    # m5 of 10 is step 15 of 30, and a unit is three steps; rounding adds 1/12 to the variance. Five standard errors.
    assert abs(len(steps) - 6000 * 0.7) < 5 * (6000 * 0.7 * 0.3) ** 0.5
    assert abs(drawn.mean() - 15) < 5 * 3 / len(steps) ** 0.5
    assert abs(drawn.var() - (9 + 1 / 12)) < 5 * 9 * (2 / len(steps)) ** 0.5


def test_the_largest_magnitude_with_noise_stays_in_range():
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    transform = automatic("rand-m10-n2-mstd3-p1-inc1")
    assert any(not torch.equal(transform(image), image) for _ in range(20))
    never = automatic("rand-m10-p0")
    assert all(torch.equal(never(image), image) for _ in range(20))


@pytest.mark.parametrize(
    "aa", ["rand-m11", "rand-inc0", "rand-x3", "rand-", "rand-m", "rand-p2", "augmix-m9", "auto", ""]
)
def test_an_unknown_policy_is_refused_when_it_is_written(aa):
    with pytest.raises(UsageError, match=f"aa '{aa}': write 'rand', 'trivial', or timm's notation"):
        Augment(aa=aa)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"crop_padding": -1}, "crop_padding must not be negative, not -1"),
        ({"hflip": 1.5}, "hflip is a probability, not 1.5"),
        ({"reprob": -0.1}, "reprob is a probability, not -0.1"),
        ({"scale": (0.5, 0.1)}, "scale is a range of areas"),
        ({"scale": (0.0, 1.0)}, "above 0 and at most 1, not 0 to 1"),
        ({"ratio": (2.0, 1.0)}, "ratio is a range above 0, not 2 to 1"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        Augment(**wrong)


def test_erasing_replaces_one_rectangle():
    image = torch.full((3, 20, 20), 128, dtype=torch.uint8)
    erased = image_transform(Augment(reprob=1.0), Framing(), PLAIN, (20, 20))(image)
    changed = (erased != 128 / 255).any(0)
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    assert changed.sum() == len(rows) * len(columns) > 0
    assert rows.max() - rows.min() == len(rows) - 1


def test_a_random_resized_crop_shows_a_part_of_the_image_in_the_size_asked_for():
    ramp = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100)
    transform = image_transform(Augment(scale=(0.2, 0.25), ratio=(1, 1)), Framing(10), PLAIN, (10, 10))
    for _ in range(10):
        row = transform(ramp)[0, 5] * 255
        assert len(row) == 10
        # From the first middle of a pixel to the last, 0.9 of the side of a fifth to a quarter of the area.
        assert 0.9 * 0.2**0.5 * 100 - 2 < row[-1] - row[0] < 0.9 * 0.25**0.5 * 100 + 2

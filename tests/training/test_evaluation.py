"""Accuracy without a recipe: the share of right answers, and a model that is left as it was."""

import pytest
import torch

from lrconvert.training.data import open_dataset
from lrconvert.training.evaluation import accuracy_of


class FirstPixels(torch.nn.Module):
    """Says the class whose number the image's brightness in tenths is."""

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.9)
        self.classes = torch.nn.Parameter(torch.arange(4.0))

    def forward(self, images):
        bright = self.drop(images).mean((1, 2, 3))
        return -(10 * bright[:, None] - self.classes).square()


USERS = """
import torch


def bright():
    images = [(torch.full((1, 2, 2), (n % 4) / 10), n % 4 if n % 5 else 0) for n in range(60)]
    return images, images, None
"""


@pytest.mark.parametrize("batch_size", [7, 128])
def test_accuracy_is_the_share_of_right_answers(tmp_path, batch_size):
    (tmp_path / "users.py").write_text(USERS)
    source = open_dataset(f"{tmp_path}/users.py:bright").validation
    model = FirstPixels().double().train()
    # Every fifth label is 0: right for one in four of those.
    assert accuracy_of(model, source, batch_size) == pytest.approx((48 + 3) / 60)
    assert model.training
    assert model.drop.training

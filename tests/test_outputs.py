"""What a network returned, without the places of tokens that are hidden."""

import pytest
import torch

from lrconvert.inputs import Call
from lrconvert.outputs import named_tensors_in, shown, shown_rows, token_mask

MASK = torch.tensor([[True, False, True], [False, False, True]])


@pytest.mark.parametrize(
    ("leading", "rows"),
    [
        ((2, 3), [0, 2, 5]),
        ((6,), [0, 2, 5]),
        ((2, 3, 2), [0, 1, 4, 5, 10, 11]),  # two heads of each token
        ((2,), None),
        ((3, 2), None),
        ((), None),
    ],
)
def test_rows_of_the_tokens_that_are_shown(leading, rows):
    found = shown_rows(leading, MASK)
    assert found is None if rows is None else found.tolist() == rows
    assert shown_rows(leading, None) is None
    if rows is not None and len(leading) > 1:
        tensor = torch.arange(torch.Size(leading).numel() * 4).reshape(*leading, 4)
        assert torch.equal(tensor.reshape(-1, 4)[found], shown(tensor, MASK).reshape(-1, 4))


def test_masks_of_other_shapes_say_nothing_of_tokens():
    square = Call((), {"attention_mask": torch.ones(2, 1, 3, 3)}, 2)
    assert token_mask(square, torch.device("cpu")) is None
    assert token_mask(Call((), {}, 2), torch.device("cpu")) is None
    assert token_mask(Call((), {"attention_mask": MASK.long()}, 2), torch.device("cpu")).equal(MASK)


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (MASK, ["output"]),
        ((MASK, MASK), ["output", "output1"]),
        ({"logits": MASK, "states": (MASK, MASK)}, ["logits", "states", "states1"]),
        ({"text": {"logits": MASK}, "image": {"logits": MASK}, "cache": object()}, ["text.logits", "image.logits"]),
        ((MASK, [MASK, {"a": MASK}]), ["output", "output1", "output11.a"]),
    ],
)
def test_names_of_what_is_returned(returned, names):
    assert [name for name, _ in named_tensors_in(returned)] == names

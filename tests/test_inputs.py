"""Calls with data: where their tensors go, and that the data itself stays as it was."""

import torch

from lrconvert.inputs import Call


class Both(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.words = torch.nn.Embedding(5, 2, dtype=dtype)

    def forward(self, x, *, ids):
        assert not ids.is_floating_point()
        return x + self.words(ids)


def test_floats_get_the_models_dtype_and_whole_numbers_stay_whole():
    call = Call((torch.ones(3, 2),), {"ids": torch.tensor([0, 1, 4])}, 3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert call.run(Both(dtype)).dtype == dtype
    assert [tensor.dtype for tensor in call.tensors] == [torch.float32, torch.int64]


def test_a_model_without_numbers_takes_them_as_they_are():
    call = Call((torch.ones(3, 2),), {}, 3)
    assert torch.equal(call.run(torch.nn.ReLU()), torch.ones(3, 2))


def test_a_changed_call_leaves_the_first_alone():
    call = Call((torch.ones(3, 2),), {"y": torch.zeros(3)}, 3)
    changed = call.changed(lambda tensor: tensor + 1)
    assert [float(tensor.max()) for tensor in changed.tensors] == [2, 1]
    assert [float(tensor.max()) for tensor in call.tensors] == [1, 0]
    assert (list(changed.kwargs), changed.size) == (["y"], 3)

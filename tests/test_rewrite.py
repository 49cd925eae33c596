"""Steps whose results are overruled."""

import pytest
import torch

from lrconvert.errors import ModelError
from lrconvert.rewrite import Rewrite, aliases_of, check_written, layout_of, moving, overruled, run
from lrconvert.tensors import refs_of


def test_values_are_written_in_the_dtype_that_was_meant_and_all_else_as_it_was():
    refs = refs_of({"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(2)})
    steps = overruled([moving(key, ref, key) for key, ref in refs.items()], {"a": torch.full((3,), 2.5)})
    assert layout_of(steps) == {"a": ((3,), torch.bfloat16), "b": ((2,), torch.float32)}
    made = dict(run(steps))
    assert torch.equal(made["a"], torch.full((3,), 2.5, dtype=torch.bfloat16))
    assert torch.equal(made["b"], torch.zeros(2))


@pytest.mark.parametrize("changed", ["a", "b"])
def test_tensors_that_shared_their_memory_are_written_apart(changed):
    shared = torch.ones(3)
    steps = [moving(key, ref, key) for key, ref in refs_of({"b": shared, "a": shared}).items()]
    assert aliases_of(steps)
    steps = overruled(steps, {changed: torch.zeros(3)})
    assert not aliases_of(steps)
    made = dict(run(steps))
    assert {key: float(tensor.sum()) for key, tensor in made.items()} == {"a": 3.0, "b": 3.0, changed: 0.0}


def test_a_step_that_is_overruled_as_a_whole_is_not_run():
    def fail():
        raise AssertionError("it was run")

    step = Rewrite("a", {"a": ((3,), torch.float32)}, 3, fail)
    assert dict(run(overruled([step], {"a": torch.ones(3)})))["a"].tolist() == [1, 1, 1]


def test_a_key_that_is_not_written_is_named():
    check_written(["a"], {"a", "b"}, "x.pt")
    with pytest.raises(ModelError, match=r"x\.pt has no tensor c: its keys are not the model's"):
        check_written(["a", "c"], {"a", "b"}, "x.pt")

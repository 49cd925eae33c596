"""How far outputs are apart: against closed forms, and what counts as an output."""

import math

import pytest
import torch

from lrconvert.errors import ModelError
from lrconvert.fidelity import Fidelity, fidelity, outputs_of
from lrconvert.inputs import Call


def call(tensor, **named):
    return Call((tensor,), named, len(tensor))


class Scaled(torch.nn.Module):
    """Its input times a number, in a structure."""

    def __init__(self, scale, returns=lambda y: y):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.returns = returns

    def forward(self, x, attention_mask=None):
        return self.returns(x * self.scale)


def test_the_error_is_relative_to_all_outputs_of_all_calls():
    calls = [call(torch.ones(2, 3)), call(torch.full((1, 3), 10.0))]
    assert fidelity(outputs_of(Scaled(1.5), calls), outputs_of(Scaled(1.0), calls)).error == pytest.approx(0.5)

    class Shifted(torch.nn.Module):
        def forward(self, x):
            return x + 1

    # Nine differences of one, against 6 · 1² + 3 · 10²: not the mean of the calls' own errors.
    got = fidelity(outputs_of(Shifted(), calls), outputs_of(Scaled(1.0), calls)).error
    assert got == pytest.approx(math.sqrt(9 / 306))


def test_every_tensor_of_a_nested_output_counts_but_only_numbers_that_are_real():
    def nested(y):
        return {"a": y, "b": [y.sum(1), (y.long(), None, "text")]}

    calls = [call(torch.tensor([[3.0, 1.0]]))]
    dense = list(outputs_of(Scaled(1.0, nested), calls))
    assert [tuple(tensor.shape) for tensor in dense[0].tensors] == [(1, 2), (1,)]
    assert dense[0].logits is None
    got = fidelity(outputs_of(Scaled(2.0, nested), calls), dense)
    assert got == Fidelity(pytest.approx(1.0), None)


def test_agreement_is_the_share_of_examples_with_the_same_largest_logit():
    class Biased(torch.nn.Module):
        def forward(self, x):
            return x + torch.tensor([0.0, 2.5])

    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    calls = [call(logits[:3]), call(logits[3:])]
    assert fidelity(outputs_of(Biased(), calls), outputs_of(Scaled(1.0), calls)).agreement == 2 / 4
    # One number an example is no choice between classes, and neither is a picture.
    for shape in ((4, 1), (4, 2, 3)):
        calls = [call(torch.ones(shape))]
        assert fidelity(outputs_of(Scaled(1.0), calls), outputs_of(Scaled(1.0), calls)).agreement is None


def test_logits_of_transformers_are_found_by_their_name():
    transformers = pytest.importorskip("transformers")
    from hf_networks import build

    transformers.utils.logging.set_verbosity_error()
    model = build("bert")
    ids = torch.arange(40).view(4, 10)
    calls = [Call((), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 4)]
    (output,) = outputs_of(model, calls)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    assert torch.allclose(output.logits, want)
    assert [tuple(tensor.shape) for tensor in output.tensors] == [(4, 2)]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_cache_is_no_output(name):
    pytest.importorskip("transformers")
    from hf_networks import build

    model, ids = build(name), torch.arange(40).view(4, 10)
    named = {"input_ids": ids} if name == "gpt2" else {"input_ids": ids, "decoder_input_ids": ids}
    (output,) = outputs_of(model, [Call((), named, 4)])
    # Of T5 the encoder's states too.
    assert [tuple(tensor.shape) for tensor in output.tensors] == [(4, 10, 99), (4, 10, 64)][: len(named)]
    assert output.logits is None


def test_what_padding_gives_does_not_count():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.ones(2, 3, 4)
    noisy = x + (1 - mask)[..., None] * 100
    clean, dirty = (list(outputs_of(Scaled(1.0), [call(each, attention_mask=mask)])) for each in (x, noisy))
    assert dirty[0].tensors[0].shape == (3, 4)
    assert fidelity(dirty, clean).error == 0
    # An output of another shape has no places for tokens.
    pooled = list(outputs_of(Scaled(1.0, lambda y: y.mean(1)), [call(x, attention_mask=mask)]))
    assert pooled[0].tensors[0].shape == (2, 4)


def test_two_dimensions_are_never_taken_for_tokens():
    mask = torch.tensor([[1, 0], [1, 0]])
    (output,) = outputs_of(Scaled(1.0), [call(torch.ones(2, 2), attention_mask=mask)])
    assert output.tensors[0].shape == output.logits.shape == (2, 2)


def test_models_are_run_in_eval_mode_without_gradients_and_left_as_they_were():
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(4, 3))
    model.train()
    model[1].eval()
    calls = [call(torch.ones(8, 4))] * 2
    outputs = list(outputs_of(model, calls))
    assert fidelity(outputs, outputs_of(model, calls)) == Fidelity(0.0, 1.0)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert not outputs[0].tensors[0].requires_grad


def test_calls_wait_for_their_turn():
    ran = []

    class Noting(torch.nn.Module):
        def forward(self, x):
            ran.append(len(x))
            return x

    outputs = outputs_of(Noting(), [call(torch.ones(n, 2)) for n in (1, 2, 3)])
    next(outputs)
    assert ran == [1]


def test_outputs_of_nothing_in_common_are_refused():
    calls = [call(torch.ones(2, 3))]
    summed = outputs_of(Scaled(1.0, lambda y: y.sum(1)), calls)
    with pytest.raises(ModelError, match=r"shapes \[\(2,\)\] cannot be compared with outputs of shapes \[\(2, 3\)\]"):
        fidelity(summed, outputs_of(Scaled(1.0), calls))


def test_zero_outputs_give_the_size_of_the_difference():
    calls = [call(torch.full((1, 2), 3.0))]
    got = fidelity(outputs_of(Scaled(1.0), calls), outputs_of(Scaled(0.0), calls)).error
    assert got == pytest.approx(math.sqrt(18))

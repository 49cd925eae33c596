"""Distillation without labels: what is compared, what moves, when it ends, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

import lrconvert
from lrconvert.errors import LrconvertError, ModelError, UsageError
from lrconvert.inputs import Call
from lrconvert.training import imitation
from lrconvert.training.imitation import imitate, trainable
from lrconvert.training.matching import Watched, blocks_of, relative_error
from lrconvert.training.pace import ByClock, BySteps, rate


class Tokens(nn.Module):
    """Two residual blocks over tokens (batch, length), a norm and dropout, as a transformer has them."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.layer = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 16)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)

    def forward(self, input_ids, attention_mask):
        hidden = self.words(input_ids)
        for block in self.layer:
            hidden = hidden + block(hidden)
        return {"last_hidden_state": self.norm(hidden), "steps": 2}


def texts(n=12, batch=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for _ in range(n):
        ids = torch.randint(20, (batch, 6), generator=generator)
        mask = (torch.arange(6) < torch.randint(2, 7, (batch, 1), generator=generator)).long()
        calls.append(Call((), {"input_ids": ids, "attention_mask": mask}, batch))
    return calls


def pair(rank=4):
    torch.manual_seed(0)
    dense = Tokens()
    small = lrconvert.factorize(copy.deepcopy(dense), f"rank={rank}", keep_first=0, keep_last=False)
    return small, dense


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_error_falls_and_only_factors_move():
    small, dense = pair()
    before, taught = weights(small), weights(dense)
    done = imitate(small, dense, texts(), epochs=10, lr=1e-2)
    assert done.error_after < 0.8 * done.error_before
    factors = trainable(small)
    after = small.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(factors)
    assert all(".u." in name or ".v." in name for name in factors)
    assert all(torch.equal(tensor, taught[name]) for name, tensor in dense.state_dict().items())
    assert (done.steps, done.epochs, done.examples, done.held_out) == (110, 10, 88, 8)
    # As they were: in training mode, and all with gradients.
    assert small.training
    assert dense.training
    assert all(parameter.requires_grad for parameter in (*small.parameters(), *dense.parameters()))


def test_the_reported_error_is_that_of_the_weights_that_are_left():
    small, dense = pair()
    calls = texts()
    done = imitate(small, dense, calls, epochs=3)
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(0)).tolist()
    call = calls[order[0]]
    mask = call.kwargs["attention_mask"].bool()
    with torch.no_grad():
        mine, theirs = (model.eval()(**call.kwargs)["last_hidden_state"][mask] for model in (small, dense))
    assert done.error_after == pytest.approx(float((mine - theirs).norm() / theirs.norm()), rel=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    runs = []
    for seed in (3, 3, 4):
        small, dense = pair()
        imitate(small, dense, texts(), epochs=2, seed=seed)
        runs.append(weights(small))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_answers_that_do_not_fit_into_memory_are_computed_again():
    runs = []
    for memory in (0, 1 << 30):
        small, dense = pair()
        imitate(small, dense, texts(), epochs=2, memory=memory)
        runs.append(weights(small))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_deadline_ends_the_run(monkeypatch):
    now = [100.0]

    def tick():
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr("time.monotonic", tick)
    small, dense = pair()
    done = imitate(small, dense, texts(), deadline=120.0)
    assert 10 < done.steps < 80
    assert now[0] <= 120.5


def test_a_deadline_that_is_over_is_refused():
    small, dense = pair()
    with pytest.raises(UsageError, match="give it more minutes"):
        imitate(small, dense, texts(), deadline=0.0)


def test_what_is_trained_of_a_recurrent_layer_and_of_attention():
    layers = nn.ModuleDict({"lstm": nn.LSTM(24, 16), "attention": nn.MultiheadAttention(32, 2)})
    lrconvert.factorize(layers, "rank=3", include=["*ih_l0", "*in_proj*"], keep_first=0)
    found = trainable(layers)
    assert {name for name in found if found[name].dim() > 1} == {
        name for name in dict(layers.named_parameters()) if name.endswith((".u.weight", ".v.weight"))
    }
    assert "lstm.bias_ih_l0" in found
    assert "lstm.weight_hh_l0" not in found


def test_a_run_that_gets_no_better_ends_with_the_weights_it_began_with():
    small, dense = pair()
    before = weights(small)
    done = imitate(small, dense, texts(), epochs=10, lr=10.0)
    assert done.error_after == done.error_before
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


@pytest.mark.parametrize(
    ("looks", "stopped_early", "kept"),
    [
        ([1, 5, 4.8, 4.6, 4.4, 4.2, 4, 3, 2, 0.9, 0.5], False, 0.5),  # worse for long, and better in the end
        ([1, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 0.1, 0.1], True, 0.5),
        ([1, 5, 6, 7, 8, 9, 10, 0.1, 0.1, 0.1, 0.1], True, 1),
    ],
)
def test_a_run_ends_early_where_its_own_looks_get_no_better(monkeypatch, looks, stopped_early, kept):
    small, dense = pair()
    errors = iter(looks)
    monkeypatch.setattr(imitation._Run, "_error", lambda self: next(errors))
    done = imitate(small, dense, texts(), epochs=10)
    assert (done.stopped_early, done.error_after) == (stopped_early, kept)


def test_a_loss_that_is_no_number_is_one_error_and_leaves_the_best_weights(monkeypatch):
    small, dense = pair()
    before = weights(small)
    monkeypatch.setattr(imitation, "relative_error", lambda got, wanted: got[0].sum() * math.nan)
    with pytest.raises(LrconvertError, match="after 0 steps: lower the learning rate"):
        imitate(small, dense, texts(), epochs=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())


def test_weights_that_are_no_numbers_are_named_before_training():
    small, dense = pair()
    with torch.no_grad():
        dense.norm.weight.fill_(math.nan)
    with pytest.raises(LrconvertError, match="NaN or infinite before any training"):
        imitate(small, dense, texts(), epochs=1)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"epochs": 0.0}, "epochs of distillation must be above 0"),
        ({"lr": math.nan}, "the learning rate of distillation must be above 0"),
        ({"deadline": 1.0}, "give one of them"),
        ({"calls": []}, "0 batch\\(es\\)"),
        ({"calls": texts(1)}, "1 batch\\(es\\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, complaint):
    small, dense = pair()
    with pytest.raises(UsageError, match=complaint):
        imitate(small, dense, **{"calls": texts(), "epochs": 1, **change})


def test_half_precision_is_refused():
    small, dense = pair()
    with pytest.raises(UsageError, match=r"torch\.float16: call model\.float"):
        imitate(small.half(), dense, texts(), epochs=1)


def test_a_network_without_factors_is_refused():
    _, dense = pair()
    with pytest.raises(UsageError, match="no factors to train"):
        imitate(copy.deepcopy(dense), dense, texts(), epochs=1)


def test_a_teacher_that_does_not_fit_is_refused():
    small, dense = pair()
    wide = copy.deepcopy(dense)
    wide.norm = nn.Linear(16, 17)
    with pytest.raises(ModelError, match="the teacher does not fit"):
        imitate(small, wide, texts(), epochs=1)
    short = copy.deepcopy(dense)
    del short.layer[1]
    with pytest.raises(ModelError, match=r"the teacher has no layer\.1"):
        imitate(small, short, texts(), epochs=1)


def test_hidden_tokens_count_for_nothing():
    small, _ = pair()
    call = texts(1)[0]
    seen = Watched(small.eval(), blocks_of(small))(call)
    ids = torch.where(call.kwargs["attention_mask"].bool(), call.kwargs["input_ids"], 0)
    other = Watched(small, blocks_of(small))(Call((), {**call.kwargs, "input_ids": ids}, call.size))
    shown = int(call.kwargs["attention_mask"].sum())
    assert [tuple(each.shape) for each in seen.tensors] == [(shown, 16)] * 3
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen.tensors, other.tensors, strict=True))


def test_blocks_are_the_elements_of_the_outermost_list_with_factors_in_several():
    small, dense = pair()
    assert blocks_of(small) == ("layer.0", "layer.1")
    assert blocks_of(dense) == ()
    assert blocks_of(nn.Sequential(nn.Flatten(), small)) == ("1.layer.0", "1.layer.1")


def test_relative_error_by_hand():
    wanted = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])]
    assert float(relative_error([torch.tensor([3.0, 3.0]), torch.tensor([1.0])], wanted)) == pytest.approx(
        (1 / 25 + 1 / 4) / 2
    )


def test_the_learning_rate_climbs_to_its_height_and_falls_to_nothing():
    shares = [each / 1000 for each in range(1001)]
    rates = [rate(share) for share in shares]
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert shares[rates.index(max(rates))] == pytest.approx(0.05)
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.0)


def test_paces(monkeypatch):
    assert [BySteps(4).share(steps) for steps in (0, 2, 4)] == [0.0, 0.5, 1.0]
    clock = ByClock(began=10.0, deadline=20.0)
    monkeypatch.setattr("time.monotonic", lambda: 14.0)
    assert clock.share(2) == pytest.approx(0.4)
    assert clock.units == 10
    # A third step, of 4 seconds like the first two, would end at 22.
    monkeypatch.setattr("time.monotonic", lambda: 18.0)
    assert clock.share(2) == 1.0
    assert ByClock(began=10.0, deadline=5.0).share(0) == 1.0

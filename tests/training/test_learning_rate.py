"""The learning rate against figures worked out by hand."""

import pytest

from lrconvert.recipe import make_recipe
from lrconvert.training.learning_rate import LearningRate


def rate(**fields):
    least = {"model": "zoo/digits_cnn", "dataset": "digits", "epochs": 300, "batch_size": 8, "lr": 0.8}
    return LearningRate(make_recipe({**least, **fields}))


def test_cuttlefish_on_cifar():
    # 0.1 → 0.8 over 5 epochs, ×0.1 at 150 and at 225 (Cuttlefish section 4.1).
    lr = rate(sched="multistep", warmup_lr=0.1, warmup_epochs=5, decay_milestones=[0.5, 0.75])
    expected = {0: 0.1, 2.5: 0.45, 5: 0.8, 149.99: 0.8, 150: 0.08, 224.9: 0.08, 225: 0.008, 299: 0.008}
    assert {epoch: lr.at(epoch) for epoch in expected} == pytest.approx(expected)


def test_milestones_may_be_epochs():
    lr = rate(sched="multistep", decay_milestones=[30, 60, 80], lr=0.1, epochs=90)
    assert [lr.at(epoch) for epoch in (29, 30, 60, 80)] == pytest.approx([0.1, 0.01, 1e-3, 1e-4])


def test_cosine_ends_at_min_lr():
    lr = rate(sched="cosine", epochs=12, warmup_epochs=2, warmup_lr=0.0, lr=1.0, min_lr=0.2)
    # Half of the ten epochs after warm-up: the middle of 1.0 and 0.2.
    assert [lr.at(epoch) for epoch in (0, 1, 2, 7, 12)] == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])


def test_plateau_falls_after_patience_and_not_below_min_lr():
    lr = rate(sched="plateau", patience_epochs=2, decay_rate=0.1, lr=1.0, min_lr=0.05)
    for accuracy in (0.5, 0.6, 0.6, 0.5):  # two epochs without a new best
        assert lr.at(0) == 1.0
        lr.epoch_ended(accuracy)
    assert lr.at(4) == pytest.approx(0.1)
    for _ in range(2):
        lr.epoch_ended(0.1)
    assert lr.at(6) == pytest.approx(0.05)


def test_rewarm_climbs_to_what_the_schedule_has_reached():
    lr = rate(sched="multistep", warmup_lr=0.1, warmup_epochs=5, lr_at_switch="rewarm")
    lr.switched(80)
    assert [lr.at(epoch) for epoch in (79.9, 80, 82.5, 85, 150)] == pytest.approx([0.8, 0.1, 0.45, 0.8, 0.08])


def test_rewarm_does_nothing_once_a_milestone_has_passed():
    lr = rate(sched="multistep", warmup_lr=0.1, warmup_epochs=5, lr_at_switch="rewarm")
    lr.switched(160)
    assert lr.at(160) == pytest.approx(0.08)


def test_factor_lasts_from_the_switch_on():
    lr = rate(lr_at_switch="factor", lr_switch_factor=0.5)
    lr.switched(10)
    assert [lr.at(epoch) for epoch in (9.9, 10, 299)] == pytest.approx([0.8, 0.4, 0.4])


def test_what_the_dense_network_reached_does_not_lower_the_rate_of_the_low_rank_one():
    lr = rate(sched="plateau", patience_epochs=2, lr=1.0)
    lr.epoch_ended(0.9)
    lr.switched(1)
    for accuracy in (0.5, 0.6, 0.7):
        lr.epoch_ended(accuracy)
    assert lr.at(4) == 1.0


def test_it_goes_on_from_its_state():
    lr = rate(sched="plateau", patience_epochs=2, lr=1.0, lr_at_switch="factor", lr_switch_factor=0.5)
    lr.switched(1)
    for accuracy in (0.5, 0.4):
        lr.epoch_ended(accuracy)
    again = rate(sched="plateau", patience_epochs=2, lr=1.0, lr_at_switch="factor", lr_switch_factor=0.5)
    again.load_state_dict(lr.state_dict())
    for each in (lr, again):
        each.epoch_ended(0.3)
    assert again.at(3) == lr.at(3) == pytest.approx(0.05)

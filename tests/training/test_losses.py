"""The distillation loss, by its definition."""

import math

import pytest
import torch
from helpers import assert_close

from lrconvert.errors import UsageError
from lrconvert.training.losses import DistillationLoss


def divergence_by_hand(student, teacher, temperature):
    """Mean over the rows of Σ p log(p / q), p of the teacher and q of the student, in Python's own floats."""
    total = 0.0
    for q_logits, p_logits in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(logit / temperature) for logit in logits] for logits in (p_logits, q_logits))
        p, q = ([value / sum(values) for value in values] for values in (p, q))
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(student)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.5), (4.0, 0.9), (0.5, 1.0), (2.0, 0.0)])
def test_the_definition(temperature, weight):
    student, teacher, task = torch.randn(6, 5), torch.randn(6, 5), torch.tensor(1.7)
    want = (1 - weight) * 1.7 + weight * temperature**2 * divergence_by_hand(student, teacher, temperature)
    assert_close(DistillationLoss(temperature, weight)(task, student, teacher), torch.tensor(want))


def test_a_student_that_agrees_has_nothing_to_learn_and_the_teacher_never_does():
    teacher = torch.randn(4, 5, requires_grad=True)
    student = (teacher.detach() + 3).requires_grad_()  # the same distribution
    loss = DistillationLoss(3.0, 1.0)(torch.tensor(9.0), student, teacher)
    assert abs(loss) < 1e-6
    loss.backward()
    assert student.grad.abs().max() < 1e-6
    assert teacher.grad is None


def test_the_gradient_keeps_its_size_at_high_temperature():
    """Hinton et al. 2015, section 2.1: for logits of mean zero it tends to (student − teacher) / classes."""
    student, teacher = (logits - logits.mean(1, keepdim=True) for logits in torch.randn(2, 1, 8, dtype=torch.float64))
    student.requires_grad_()
    DistillationLoss(200.0, 1.0)(torch.tensor(0.0), student, teacher).backward()
    assert_close(student.grad, (student - teacher).detach() / 8, 0.02)


def test_values_out_of_range_are_refused():
    with pytest.raises(UsageError, match="temperature of distillation must be above 0, not 0"):
        DistillationLoss(0, 0.5)
    with pytest.raises(UsageError, match="weight of distillation must be from 0 to 1, not 2"):
        DistillationLoss(1, 2)

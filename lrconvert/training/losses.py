"""Losses beyond torch's. Label smoothing, with whole or soft targets, is `nn.CrossEntropyLoss(label_smoothing=…)`."""

from torch import Tensor, nn
from torch.nn import functional

from lrconvert.errors import UsageError


class DistillationLoss(nn.Module):
    """(1 − w) · task loss + w · T² · KL(teacher at T ‖ student at T), a mean over the batch.

    From Hinton et al. 2015, https://arxiv.org/abs/1503.02531: a temperature T divides the logits, and T² keeps the
    gradient's size, whatever T is.

    Args:
        temperature: T, above 0.
        weight: w, from 0 to 1.

    Raises:
        UsageError: a value is out of range.
    """

    def __init__(self, temperature: float, weight: float) -> None:
        super().__init__()
        if temperature <= 0:
            raise UsageError(f"the temperature of distillation must be above 0, not {temperature:g}")
        if not 0 <= weight <= 1:
            raise UsageError(f"the weight of distillation must be from 0 to 1, not {weight:g}")
        self.temperature = temperature
        self.weight = weight

    def forward(self, task_loss: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
        """A scalar.

        Args:
            task_loss: the student's loss by the labels, a scalar.
            student: logits (b, classes).
            teacher: logits (b, classes), through which no gradient flows.
        """
        # float32: under mixed precision, logits divided by T differ by less than float16 can tell.
        softened = [
            functional.log_softmax(logits.float() / self.temperature, 1) for logits in (student, teacher.detach())
        ]
        divergence = functional.kl_div(softened[0], softened[1], reduction="batchmean", log_target=True)
        return (1 - self.weight) * task_loss + self.weight * self.temperature**2 * divergence

"""What a sweep over budgets found, as plain data; see `lrconvert.report.record`."""

from math import inf, isnan
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from lrconvert.cost import MAC_CONVENTION
from lrconvert.report.record import Record


class SweepPoint(BaseModel):
    """One row of `sweep`: the best plan of an allocator within a budget.

    Attributes:
        allocator: see `lrconvert.budget.ALLOCATORS`.
        ratio: the budget, compressed / original.
        plan_ratio: the budget that the plan was made for: a smaller one where that plan turned out to be better.
        num_params, macs: of the whole network; MACs for one input, where it was traced.
        low_rank: layers that are factorized.
        error_predicted: without examples √(total ‖W − W_r‖² / total ‖W‖²) over the layers that may be factorized; with
            examples ‖y′ − y‖ / ‖y‖ of the network's output, None where a factorized layer was not met in calibration.
        error_measured: ‖y′ − y‖ / ‖y‖ of the outputs on held-out examples; None without.
        agreement: share of those whose largest logit is in the same place; None where there are no logits.
        held_out: how many examples these two are of.
        accuracy: on the validation images, measured; None where none were named.
        latency_ms, latency_dense_ms: of one call, measured in turns; None where it was not asked for.
        pareto: whether no other row has less error (or more accuracy) at the same cost or less.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    allocator: str
    ratio: float
    plan_ratio: float
    num_params: int
    macs: int | None
    low_rank: int
    error_predicted: float | None
    error_measured: float | None = None
    agreement: float | None = None
    held_out: int = 0
    accuracy: float | None = None
    latency_ms: float | None = None
    latency_dense_ms: float | None = None
    pareto: bool = False

    @property
    def loss(self) -> float:
        """What budgets are compared by, the lower the better: inaccuracy, measured error or predicted error."""
        if self.accuracy is not None:
            return 1 - self.accuracy
        known = self.error_predicted if self.error_measured is None else self.error_measured
        return inf if known is None or isnan(known) else known

    @property
    def latency_ratio(self) -> float | None:
        """Factorized / dense, measured."""
        if self.latency_ms is None or self.latency_dense_ms is None:
            return None
        return self.latency_ms / self.latency_dense_ms


class SweepRecord(Record):
    """Error or accuracy of a network against its size, over budgets and allocators.

    Attributes:
        source, model, mac_convention, notes: as in `lrconvert.report.record.AnalyzeRecord`.
        by: what the budgets count.
        calibrated: whether errors are of the output, from examples.
        held_out: examples that errors are measured on; None without.
        validation: dataset whose validation images accuracy is measured on; None without.
        num_params, macs: of the dense network.
        accuracy: of the dense network, measured.
        latency_note: on what latency was measured.
        points: one row a budget and allocator, by allocator and falling budget. Within one allocator a larger budget
            never does worse.
    """

    rows: ClassVar[str] = "points"
    command: Literal["sweep"] = "sweep"
    source: str
    model: str | None
    by: Literal["params", "macs"]
    calibrated: bool
    held_out: int | None
    validation: str | None
    num_params: int
    macs: int | None
    mac_convention: str = MAC_CONVENTION
    accuracy: float | None
    latency_note: str | None
    notes: tuple[str, ...]
    points: tuple[SweepPoint, ...]

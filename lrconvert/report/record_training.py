"""What the trainer did and measured, as plain data; see `lrconvert.report.record`."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from lrconvert.cost import MAC_CONVENTION
from lrconvert.report.record import LayerDecision, Record


class EpochMetrics(BaseModel):
    """One epoch of a training run; all of it measured.

    Attributes:
        epoch: counted from 0.
        phase: in which it was trained.
        learning_rate: at its first step.
        loss, accuracy: over the training batches, while the weights changed.
        validation_loss, validation_accuracy: on the held-out images, after it.
        images_per_second: of training, over all processes.
        train_seconds, evaluation_seconds, tracking_seconds: spent on steps, on validation and on rank curves.
        switched: whether the network became low rank after it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epoch: int
    phase: Literal["full-rank", "low-rank"]
    learning_rate: float
    loss: float
    accuracy: float
    validation_loss: float
    validation_accuracy: float
    images_per_second: float
    train_seconds: float
    evaluation_seconds: float
    tracking_seconds: float
    switched: bool


class PhaseTime(BaseModel):
    """What one phase of a run took: epochs, seconds with validation, and training images a second."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int
    seconds: float
    images_per_second: float | None


class TrafficFigures(BaseModel):
    """Bytes of gradients that each process handed to collectives in one step, by phase, and without compression."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    phase: Literal["full-rank", "low-rank"]
    method: str
    steps: int
    bytes_per_step: float
    uncompressed_bytes_per_step: float


class TrainRecord(Record):
    """What a training run did.

    Attributes:
        output: its folder.
        model, dataset, method: from the recipe; the method of low-rank training.
        processes, device, amp: what it ran on.
        epochs: trained.
        switch_epoch: E, epochs of full-rank training; None if the network stayed dense.
        keep_first: K.
        num_params_before, num_params_after, trainable_params_after: of the network.
        macs_before, macs_after: for one image, where the network could be traced.
        validation_accuracy: the best, of the phase the run ended in.
        best_epoch: when that was; these weights were kept and tested.
        test_loss, test_accuracy: on the test images, once, at the end; None where there are none.
        seconds: the whole run, with everything.
        full_rank, low_rank: time by phase.
        tracking_seconds, profiling_seconds, switch_seconds: of rank curves, of choosing K, and of the switch.
        tracking_share: tracking after full-rank epochs over the training in them; the initial measurement is not in it.
        traffic: between processes; empty for one process.
        notes: what a user should know.
        curves: layer to its stable rank at initialisation and after each full-rank epoch.
        layers: what became of each layer; empty if the network stayed dense.
        history: one entry an epoch.
    """

    rows: ClassVar[str] = "history"
    command: Literal["train"] = "train"
    output: str
    model: str
    dataset: str
    method: str
    processes: int
    device: str
    amp: str
    epochs: int
    switch_epoch: int | None
    keep_first: int | None
    num_params_before: int
    num_params_after: int
    trainable_params_after: int
    macs_before: int | None
    macs_after: int | None
    mac_convention: str = MAC_CONVENTION
    validation_accuracy: float
    best_epoch: int
    test_loss: float | None
    test_accuracy: float | None
    seconds: float
    full_rank: PhaseTime
    low_rank: PhaseTime
    tracking_seconds: float
    profiling_seconds: float
    switch_seconds: float
    tracking_share: float | None
    traffic: tuple[TrafficFigures, ...]
    notes: tuple[str, ...]
    curves: dict[str, tuple[float, ...]]
    layers: tuple[LayerDecision, ...]
    history: tuple[EpochMetrics, ...]


class EvaluateRecord(Record):
    """What `evaluate` measured.

    Attributes:
        source, model, dataset: what was evaluated on what.
        split: "test", or "validation" where there is no test split.
        images: evaluated, each once.
        num_params, macs: predicted.
        loss, accuracy: measured.
        latency: of one batch.
        batch_size: of the latency.
    """

    command: Literal["evaluate"] = "evaluate"
    source: str
    model: str | None
    dataset: str
    split: Literal["test", "validation"]
    images: int
    num_params: int
    macs: int | None
    mac_convention: str = MAC_CONVENTION
    loss: float
    accuracy: float
    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    latency_runs: int
    batch_size: int
    device: str


class DistillRecord(Record):
    """What `distill` did.

    Attributes:
        source, teacher, data: the factorized network, the dense one, and the examples, as they were given.
        output: what was written; None for a live model, which was changed in place.
        num_params, trained_params: parameters of the factorized network, and of its factors, which were trained.
        compared: what of the outputs was compared.
        blocks: the modules whose outputs were compared besides.
        examples, held_out: trained on, and only watched.
        steps, epochs: taken, and passes over the examples.
        seconds: the whole job, with everything.
        error_before, error_after: ‖y′ − y‖ / ‖y‖ of what was compared, on the held-out examples, measured.
        stopped_early: whether it ended because the error fell no more.
        device: what it ran on.
        notes: what a user should know.
    """

    command: Literal["distill"] = "distill"
    source: str
    teacher: str
    data: str
    output: str | None
    num_params: int
    trained_params: int
    compared: Literal["outputs", "sentence embeddings"]
    blocks: tuple[str, ...]
    examples: int
    held_out: int
    steps: int
    epochs: float
    seconds: float
    error_before: float
    error_after: float
    stopped_early: bool
    device: str
    notes: tuple[str, ...]

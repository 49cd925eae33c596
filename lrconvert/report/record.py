"""What each command found out or did, as plain data: printed, written as JSON or CSV, returned to Python.

Predicted figures (parameters, MACs, errors) follow from shapes and spectra. Measured figures (bytes, milliseconds,
accuracies, differences) come from files and runs. No field mixes the two.
"""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from lrconvert.cost import MAC_CONVENTION
from lrconvert.plan import Target


class Record(BaseModel):
    """Base of all records. `schema_version` goes up when a field changes its meaning or goes away.

    Attributes:
        rows: name of the field that is a table, one row an entry; empty if there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: ClassVar[str] = ""

    schema_version: Literal[1] = 1
    command: str


class LayerSpectrum(BaseModel):
    """One row of `analyze`. Ranks are per group for a grouped convolution.

    Attributes:
        name, kind, shape, groups, evidence: see `lrconvert.layers.Layer`.
        num_params: elements of the weight.
        macs: multiply-accumulates for one input, where the model was traced.
        full_rank, break_even_rank: of the matrix view.
        stable_rank: Σσ²/σ_max², the largest over groups.
        xi, scaled_stable_rank: ξ, and ξ times the stable rank.
        xi_source: "closed form" or "measured".
        accumulative_rank_80: smallest rank that keeps 0.8 of Σσ.
        energy_rank_90: smallest rank that keeps 0.9 of Σσ².
        sigma_max, frobenius_norm: of the whole weight.
        profile: σ/σ_max of the first group at 24 evenly spaced indices, from the largest to the smallest.
        dense_reason: why it cannot be factorized; empty when it can.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    evidence: Literal["module", "shape"]
    num_params: int
    macs: int | None
    full_rank: int
    break_even_rank: int
    stable_rank: float
    xi: float
    xi_source: Literal["closed form", "measured"]
    scaled_stable_rank: float
    accumulative_rank_80: int
    energy_rank_90: int
    sigma_max: float
    frobenius_norm: float
    profile: tuple[float, ...]
    dense_reason: str


class AnalyzeRecord(Record):
    """What `analyze` found.

    Attributes:
        source: the checkpoint.
        model: its architecture, where it was named.
        order: of the rows, see `lrconvert.plan.Plan`.
        num_params: of the whole network.
        macs: of the whole network for one input, where it was traced.
        mac_convention: what counts as a MAC.
        nbytes: size on disk.
        notes: how it was read.
        layers: one row a weight.
    """

    rows: ClassVar[str] = "layers"
    command: Literal["analyze"] = "analyze"
    source: str
    model: str | None
    order: Literal["execution", "file"]
    num_params: int
    macs: int | None
    mac_convention: str = MAC_CONVENTION
    nbytes: int | None
    notes: tuple[str, ...]
    layers: tuple[LayerSpectrum, ...]


class LayerDecision(BaseModel):
    """One row of `factorize`.

    Attributes:
        name, kind, shape, groups, rank, reason, error, norm, view, pivoted, data_aware: see `lrconvert.plan.LayerPlan`.
        full_rank: of the matrix view.
        num_params_before, num_params_after: elements of the weight, and of what replaces it.
        macs_before, macs_after: for one input, where the model was traced.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    full_rank: int
    rank: int | None
    reason: str
    error: float | None
    num_params_before: int
    num_params_after: int
    macs_before: int | None
    macs_after: int | None
    norm: bool = False
    view: str = "channel"
    pivoted: bool = False
    data_aware: bool = False


class FactorizeRecord(Record):
    """What `factorize` did, or with a dry run would do.

    Attributes:
        source, model, order, mac_convention, notes: as in `AnalyzeRecord`.
        output: what was written; None for a dry run.
        rule: the rule or the budget that chose the ranks.
        target: what a budget asked for and what is reached, predicted; None without, and for plans read from a file.
        num_params_before, num_params_after: of the whole network.
        macs_before, macs_after: of the whole network for one input, where it was traced.
        latency_before_ms, latency_after_ms: time of one call of the dense model and of the factorized one, fastest of
            those that were measured in turns; None where nothing was timed.
        latency_after_predicted_ms: of the factorized model, from the times of its layers alone.
        latency_note: on what they were measured: device, threads and batch.
        nbytes_before, nbytes_after: size on disk, measured.
        seconds: time spent on reading, factorizing and writing, measured.
        checked_with, difference: what ran the written graph beside the one with merged weights, and the largest
            ‖got − want‖ / ‖want‖, measured; None for files that are no graphs, and for graphs that could not be run.
        layers: one row a weight.
    """

    rows: ClassVar[str] = "layers"
    command: Literal["factorize"] = "factorize"
    source: str
    output: str | None
    model: str | None
    order: Literal["execution", "file"]
    rule: str
    target: Target | None = None
    latency_before_ms: float | None = None
    latency_after_ms: float | None = None
    latency_after_predicted_ms: float | None = None
    latency_note: str | None = None
    num_params_before: int
    num_params_after: int
    macs_before: int | None
    macs_after: int | None
    mac_convention: str = MAC_CONVENTION
    nbytes_before: int | None
    nbytes_after: int | None
    seconds: float | None
    checked_with: str | None = None
    difference: float | None = None
    notes: tuple[str, ...]
    layers: tuple[LayerDecision, ...]


class ExportRecord(Record):
    """What `export` wrote.

    Attributes:
        source, output: paths.
        format: the target.
        nbytes: size on disk, measured.
        checked_with: what ran the exported model, or read the file back.
        batch_sizes: batch sizes it was run with.
        lengths: open dimensions other than the batch, by name, and the sizes it was run with.
        difference: largest ‖got − want‖ / ‖want‖ over outputs and batches; None where nothing was run.
        opset: of an ONNX graph.
        notes: why a length is fixed.
    """

    command: Literal["export"] = "export"
    source: str
    output: str
    format: str
    nbytes: int
    checked_with: str
    batch_sizes: tuple[int, ...] = ()
    lengths: dict[str, tuple[int, ...]] = {}
    difference: float | None = None
    opset: int | None = None
    notes: tuple[str, ...] = ()


class LayerDifference(BaseModel):
    """One row of `compare`: a weight that both networks have.

    Attributes:
        name: the layer.
        rank: (first, second); None where it is dense.
        difference: ‖B − A‖ / ‖A‖ of the (merged) weights, measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[int, ...]
    rank: tuple[int | None, int | None]
    difference: float


class Side(BaseModel):
    """One of the two networks of `compare`.

    Attributes:
        source, model: as in `AnalyzeRecord`.
        num_params, macs: predicted.
        nbytes, latency_ms: measured; the median, with quartiles in `latency_range_ms`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    model: str | None
    num_params: int
    macs: int | None
    nbytes: int
    latency_ms: float | None = None
    latency_range_ms: tuple[float, float] | None = None


class CompareRecord(Record):
    """Two networks side by side.

    Attributes:
        first, second: the networks.
        mac_convention: what counts as a MAC.
        output_difference: ‖b − a‖ / ‖a‖ of the outputs for the same random input, measured; None where the
            architecture is not known.
        latency_note: on what the latency was measured.
        only_first, only_second: keys of (merged) tensors that only one has.
        layers: one row a weight that both have.
    """

    rows: ClassVar[str] = "layers"
    command: Literal["compare"] = "compare"
    first: Side
    second: Side
    mac_convention: str = MAC_CONVENTION
    output_difference: float | None
    latency_note: str | None
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    layers: tuple[LayerDifference, ...]


class InfoRecord(Record):
    """What a file says about itself, without reading its tensors.

    Attributes:
        source, format, notes: as it was read.
        nbytes, num_tensors, num_params, dtypes: what is in it.
        written_by, model, input_shape, rule: from its header, if lrconvert wrote it.
        num_params_dense, macs_dense: of the network before it was factorized.
        low_rank: the factorized layers.
        dense: number of weights that stayed dense, by reason.
    """

    rows: ClassVar[str] = "low_rank"
    command: Literal["info"] = "info"
    source: str
    format: str
    notes: tuple[str, ...]
    nbytes: int
    num_tensors: int
    num_params: int
    dtypes: tuple[str, ...]
    written_by: str | None = None
    model: str | None = None
    input_shape: tuple[int, ...] | None = None
    rule: str | None = None
    num_params_dense: int | None = None
    macs_dense: int | None = None
    low_rank: tuple[LayerDecision, ...] = ()
    dense: dict[str, int] = {}


class DemoStep(BaseModel):
    """One model of the demo.

    Attributes:
        name: "dense", "low rank", "low rank, fine-tuned", "ONNX".
        num_params, macs: predicted.
        nbytes, accuracy, latency_ms: measured; accuracy on held-out digits, latency of one batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    num_params: int
    macs: int
    nbytes: int
    accuracy: float
    latency_ms: float


class DemoRecord(Record):
    """What the demo did.

    Attributes:
        folder: where its files are.
        batch_size: of the latency measurements.
        steps: one row a model.
    """

    rows: ClassVar[str] = "steps"
    command: Literal["demo"] = "demo"
    folder: str
    batch_size: int
    mac_convention: str = MAC_CONVENTION
    steps: tuple[DemoStep, ...]

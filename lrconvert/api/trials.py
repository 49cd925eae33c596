"""One network tried at many plans: what is known of it and what is measured is computed when it is asked for, once."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrconvert.allocation import FloatArray
from lrconvert.analysis import Progress, analyze_layers
from lrconvert.api.cache import Cache
from lrconvert.api.calibrate import calibrate
from lrconvert.api.identity import data_key, network_key
from lrconvert.api.make_plan import data_aware
from lrconvert.api.validation import Validation, tried
from lrconvert.bench import Bench, factorized
from lrconvert.budget import FROM_EXAMPLES
from lrconvert.calibration import Calibration
from lrconvert.errors import LrconvertError
from lrconvert.fidelity import Output, fidelity, outputs_of
from lrconvert.inputs import Call
from lrconvert.layers import Layer
from lrconvert.loading import model_of
from lrconvert.network import Network
from lrconvert.plan import Plan
from lrconvert.response import Response
from lrconvert.samples import read_samples
from lrconvert.spectrum import Spectrum

# Names of a response's tensors in a file: "side:part:layer".
_PARTS = ("metric", "signal", "mean")


@dataclass(frozen=True)
class Examples:
    """What a network is calibrated on, and what errors are measured on.

    Attributes:
        data: see `lrconvert.samples.read_samples`.
        count: examples to calibrate on.
        held_out: other examples, to measure errors on.
        seed: of the choice.
        data_dir: of a dataset.
        measure: whether the calibration measures sensitivity too.
    """

    data: str
    count: int
    held_out: int
    seed: int
    data_dir: str | Path
    measure: bool

    @property
    def key(self) -> dict[str, Any]:
        """What tells these examples from others."""
        return {**asdict(self), **data_key(self.data, self.data_dir)}


class Trials:
    """A dense network that is factorized by one plan after the other.

    Args:
        network: the dense network.
        cache: where results are looked up and kept.
        device: where to compute.
        examples: to calibrate on; None to go by the weights alone.
        validation: what accuracy is measured on, if it is.
        bench: what latency is measured on, if it is.
        progress: see `lrconvert.analyze`.
    """

    def __init__(
        self,
        network: Network,
        cache: Cache,
        device: torch.device,
        *,
        examples: Examples | None = None,
        validation: Validation | None = None,
        bench: Bench | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.network, self.cache, self.device, self.progress = network, cache, device, progress
        self.examples, self.validation, self.bench = examples, validation, bench
        self._key = network_key(network)

    def spectra(self, layers: Sequence[Layer]) -> dict[str, Spectrum]:
        """Of the weights of `layers`, by name."""

        def compute() -> dict[str, torch.Tensor]:
            found = analyze_layers(self.network, layers, None, self.device, self.progress).spectra
            values = {f"values:{name}": spectrum.values for name, spectrum in found.items()}
            return values | {f"energy:{name}": spectrum.energy for name, spectrum in found.items()}

        key = {**self._key, "layers": [[layer.name, layer.kind, layer.shape, layer.groups] for layer in layers]}
        stored = self.cache.tensors("spectra", key, compute)
        return {
            layer.name: Spectrum(stored[f"values:{layer.name}"], stored[f"energy:{layer.name}"]) for layer in layers
        }

    def curves(self, allocator: str) -> Mapping[str, FloatArray] | None:
        """What layers err at every rank in the eyes of `allocator`, where that takes it from examples; else None."""
        return None if self.examples is None else self._curves.get(allocator)

    @property
    def output_curves(self) -> Mapping[str, FloatArray]:
        """By layer name, predicted squared error of the output at every rank, as a share of the output's energy.

        Empty without examples.
        """
        if self.examples is None:
            return {}
        energy = self._calibrated["output_energy"]
        return {name: curve / energy for name, curve in self._curves["output_error"].items()} if energy else {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the examples come from, in words."""
        return () if self.examples is None else tuple(f"calibrated on {note}" for note in self._calibrated["notes"])

    def error(self, plan: Plan) -> tuple[float | None, float | None, int]:
        """(‖y′ − y‖ / ‖y‖ of the outputs, agreement, held-out examples that they are of); see `lrconvert.fidelity`.

        Both figures are None where the data has no more examples than were calibrated on.
        """

        def compute() -> dict[str, Any]:
            if not self._held_out:
                return {"error": None, "agreement": None, "examples": 0}
            found = fidelity(outputs_of(self._tried(plan), self._held_out), self._wanted)
            return {**asdict(found), "examples": sum(call.size for call in self._held_out)}

        assert self.examples is not None
        found = self.cache.numbers("error", self._plan_key(plan), compute)
        return found["error"], found["agreement"], found["examples"]

    def accuracy(self, plan: Plan | None) -> float:
        """On the validation images, of the network factorized by `plan`, or dense for None."""
        validation = self.validation
        assert validation is not None

        def compute() -> dict[str, Any]:
            return {"accuracy": validation.accuracy(self._tried(plan))}

        key = {**self._plan_key(plan), "labelled": data_key(validation.name, validation.data_dir)}
        return float(self.cache.numbers("accuracy", key, compute)["accuracy"])

    def latency(self, plan: Plan) -> tuple[float, float]:
        """Milliseconds of one call, (dense, factorized by `plan`), measured in turns."""
        bench = self.bench
        assert bench is not None

        def compute() -> dict[str, Any]:
            dense = self._placed
            dense_ms, low_rank_ms = bench.measure([dense, factorized(dense, plan)])
            return {"dense_ms": dense_ms, "low_rank_ms": low_rank_ms}

        ranks = [[layer.name, layer.rank] for layer in plan.low_rank]
        inputs = [repr(each) for each in bench.inputs]
        found = self.cache.numbers(
            "latency", {**self._key, "ranks": ranks, "bench": str(bench), "inputs": inputs}, compute
        )
        return found["dense_ms"], found["low_rank_ms"]

    def _plan_key(self, plan: Plan | None) -> dict[str, Any]:
        ranks = [] if plan is None else [[layer.name, layer.rank] for layer in plan.low_rank]
        examples = self.examples.key if self.examples is not None and ranks else None
        return {**self._key, "ranks": ranks, "examples": examples}

    def _tried(self, plan: Plan | None) -> nn.Module:
        if plan is None or self.examples is None:
            return tried(self._dense, plan, self.device, {})
        return tried(self._dense, data_aware(plan, self._responses), self.device, self._responses)

    @cached_property
    def _dense(self) -> nn.Module:
        return model_of(self.network)

    @cached_property
    def _placed(self) -> nn.Module:
        assert self.bench is not None
        return self.bench.place(self._dense)

    @cached_property
    def _held_out(self) -> tuple[Call, ...]:
        """Examples that were not calibrated on."""
        examples = self.examples
        assert examples is not None
        try:
            return read_samples(
                examples.data,
                self.network,
                count=examples.held_out,
                skip=examples.count,
                seed=examples.seed,
                data_dir=examples.data_dir,
            ).calls
        except LrconvertError:
            # The same data was read for calibration: there are no more.
            return ()

    @cached_property
    def _wanted(self) -> list[Output]:
        """What the dense network returns for the held-out examples."""
        return list(outputs_of(tried(self._dense, None, self.device, {}), self._held_out))

    @property
    def _calibrated(self) -> dict[str, Any]:
        """What sweeps take from the calibration besides tensors."""

        def compute() -> dict[str, Any]:
            return {"output_energy": self._calibration.output_energy, "notes": list(self._calibration.notes)}

        assert self.examples is not None
        return self.cache.numbers("calibration", {**self._key, **self.examples.key}, compute)

    @cached_property
    def _curves(self) -> dict[str, dict[str, FloatArray]]:
        """Error curves by allocator and layer name, for which the responses need not be read."""

        def compute() -> dict[str, torch.Tensor]:
            return {
                f"{allocator}:{name}": torch.from_numpy(curve)
                for allocator in FROM_EXAMPLES
                for name, curve in (self._calibration.curves_for(allocator) or {}).items()
            }

        assert self.examples is not None
        found: dict[str, dict[str, FloatArray]] = {allocator: {} for allocator in FROM_EXAMPLES}
        for key, curve in self.cache.tensors("curves", {**self._key, **self.examples.key}, compute).items():
            allocator, _, name = key.partition(":")
            found[allocator][name] = curve.numpy()
        return found

    @cached_property
    def _responses(self) -> dict[str, Response]:
        """By layer name, see `lrconvert.response`."""

        def compute() -> dict[str, torch.Tensor]:
            return {
                f"{response.side}:{part}:{name}": tensor
                for name, response in self._calibration.responses.items()
                for part in _PARTS
                if (tensor := getattr(response, part)) is not None
            }

        assert self.examples is not None
        parts: dict[str, dict[str, Any]] = {}
        for key, tensor in self.cache.tensors("responses", {**self._key, **self.examples.key}, compute).items():
            side, part, name = key.split(":", 2)
            parts.setdefault(name, {"side": side, "metric": None})[part] = tensor
        return {name: Response(name, **each) for name, each in parts.items()}

    @cached_property
    def _calibration(self) -> Calibration:
        """The calibration itself, run."""
        examples = self.examples
        assert examples is not None
        return calibrate(
            self.network,
            examples.data,
            count=examples.count,
            seed=examples.seed,
            measure=examples.measure,
            data_dir=examples.data_dir,
            device=str(self.device),
            progress=self.progress,
        )

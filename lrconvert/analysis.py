"""Spectra of a whole network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lrconvert.errors import UsageError
from lrconvert.layers import Layer
from lrconvert.network import Network
from lrconvert.parallel import map_layers
from lrconvert.ranks import closed_form_xi, measured_xi
from lrconvert.spectrum import Spectrum, spectrum_of

Progress = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True)
class Analysis:
    """A network and the spectra of its layers.

    Attributes:
        network: what was analyzed.
        spectra: by layer name; layers that were left out are missing.
        initial: spectra at initialisation by layer name, from --init; empty without.
    """

    network: Network
    spectra: Mapping[str, Spectrum]
    initial: Mapping[str, Spectrum]

    def xi(self, layer: Layer) -> float:
        """ξ of the scaled stable rank: measured where the initial weights are known, else the closed form."""
        initial = self.initial.get(layer.name)
        return measured_xi(layer, initial) if initial is not None else closed_form_xi(layer)


def analyze_layers(
    network: Network,
    layers: Sequence[Layer],
    initial: Network | None = None,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Spectra of `layers`, and of the same layers in `initial`.

    Raises:
        WeightError: a weight is not finite.
        UsageError: `initial` does not hold these layers.
    """
    at_init: Mapping[str, Spectrum] = {}
    if initial is not None:
        for layer in layers:
            ref = initial.tensors.get(layer.weight)
            if ref is None or ref.shape != layer.shape:
                found = ref.shape if ref else "nothing"
                raise UsageError(f"--init: {layer.weight} is {layer.shape}, but {initial.name} holds {found}")
        at_init = _spectra(initial, layers, device, progress and progress("initial spectra", len(layers)))
    spectra = _spectra(network, layers, device, progress and progress("spectra", len(layers)))
    return Analysis(network, spectra, at_init)


def _spectra(
    network: Network, layers: Sequence[Layer], device: torch.device | None, advance: Callable[[], None] | None
) -> dict[str, Spectrum]:
    device = device or torch.device("cpu")

    def job(layer: Layer) -> Spectrum:
        weight = network.tensors[layer.weight].read().to(device)
        return spectrum_of(layer.layout.matrices(weight, layer.groups), layer.name)

    found = {}
    for layer, spectrum in map_layers(job, layers, size=lambda layer: layer.num_params, device=device):
        found[layer.name] = spectrum
        if advance:
            advance()
    return found

"""The network a job works on: its tensors, its layers in order, and what a forward pass showed of it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lrconvert.checkpoints import Checkpoint, open_checkpoint
from lrconvert.checkpoints.quantized import describe
from lrconvert.cost import Trace, trace
from lrconvert.errors import CheckpointError, ModelError, PlanError, UsageError
from lrconvert.fit import as_model_has_it, fit
from lrconvert.images import ImagePreparation
from lrconvert.inputs import Inputs, one_input
from lrconvert.layers import EXPERT_KINDS, LAYOUTS, Layer
from lrconvert.layers.survey import layers_of_module, layers_of_tensors
from lrconvert.models import Architecture, architecture_in, find_architecture, inputs_of_live
from lrconvert.patterns import first_match
from lrconvert.plan import Order
from lrconvert.tensors import TensorRef, count_parameters, refs_of

if TYPE_CHECKING:
    from lrconvert.onnx_graph.graph import Graph


@dataclass(frozen=True)
class Network:
    """A network whose tensors have not been read yet.

    Attributes:
        name: the path, or the class of a live model.
        tensors: its state dict.
        layers: every weight of two or more dimensions, in `order`.
        order: "execution" where a forward pass showed it, else "file".
        num_params: parameters, shared ones counted once.
        trace: what one forward pass showed, where there was one.
        module: the live model, or the architecture on the meta device, reshaped by the file's plan if it has one.
        checkpoint: the file, unless the source was a live model.
        architecture: where the module came from, if it was built by name.
        inputs: what the model is called with, where it is known.
        notes: what a user should know about how it was read.
    """

    name: str
    tensors: dict[str, TensorRef]
    layers: tuple[Layer, ...]
    order: Order
    num_params: int
    trace: Trace | None = None
    module: nn.Module | None = None
    checkpoint: Checkpoint | None = None
    architecture: Architecture | None = None
    inputs: Inputs | None = None
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> ImagePreparation:
        """How images are to be prepared for it; nothing is set where its file does not say it."""
        return self.checkpoint.images if self.checkpoint is not None else ImagePreparation()


# Kinds of weights that have no singular values to speak of.
NOT_REAL = frozenset({"quantized", "complex", "integer"})

Source = str | Path | Checkpoint | nn.Module | Network


def open_network(
    source: Source,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Network:
    """Find out what can be known about `source` without reading its weights.

    Args:
        source: path of a checkpoint, an open checkpoint, or a live model; a network comes back as it is.
        model: name of the architecture; a file that lrconvert wrote may name it itself.
        model_args: keyword arguments of the architecture.
        input_shape: shape of one input without the batch, to find the execution order and count MACs.

    Raises:
        CheckpointError: the file cannot be read.
        ModelError: the architecture cannot be built, or does not match the file.
    """
    if isinstance(source, Network):
        return source
    if isinstance(source, nn.Module):
        for key, parameter in source.named_parameters():
            if isinstance(parameter, nn.UninitializedParameter):
                raise ModelError(f"{key} has no shape yet: run one batch through the model first")
            if parameter.is_meta:
                raise ModelError(f"{key} has no values, it is on the meta device: load the model's weights first")
        tensors = refs_of(source.state_dict())
        network = Network(type(source).__name__, tensors, (), "file", 0, module=source)
        return _with_module(network, source, one_input(input_shape or _own_shape(source)) or inputs_of_live(source))
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    network = Network(
        str(checkpoint.path), checkpoint.tensors, (), "file", 0, checkpoint=checkpoint, notes=checkpoint.notes
    )
    if checkpoint.graph is not None:
        return _from_graph(network, checkpoint.graph, model, input_shape)
    architecture = architecture_of(checkpoint, model, model_args)
    if architecture is None:
        return _from_own_config(network, input_shape) or _from_file_alone(network)
    return _from_architecture(network, checkpoint, architecture, input_shape)


def _from_own_config(network: Network, input_shape: tuple[int, ...] | None) -> Network | None:
    """The network with the model that its folder's config.json describes, where that works."""
    checkpoint = network.checkpoint
    if checkpoint is None or checkpoint.quantized:
        return None
    architecture = own_architecture(checkpoint)
    if architecture is None:
        return None
    try:
        return _from_architecture(network, checkpoint, architecture, input_shape)
    except (ModelError, PlanError) as error:
        # Nobody asked for this model: the file alone will do.
        note = f"read from the file alone: config.json names {architecture.name}, but {error}"
        network = _from_file_alone(network)
        layers = _settled(network.layers, architecture)
        return replace(network, layers=layers, notes=(*network.notes, note))


def _settled(layers: tuple[Layer, ...], architecture: Architecture) -> tuple[Layer, ...]:
    """`layers` of a file, by what its architecture says of them, though not all of its keys are the model's."""
    if architecture.renamed is None:
        return layers
    try:
        model = architecture.build()
    except ModelError:
        return layers
    names = architecture.renamed(model, [layer.weight for layer in layers])
    known = {layer.weight: layer for layer in layers_of_module(model)}
    settled = []
    for layer in layers:
        name = names[layer.weight]
        found = known.get(name) if name else None
        if name is None or (found is not None and found.kind in EXPERT_KINDS and name != layer.weight):
            layer = replace(layer, dense_reason="merged with others when it is loaded", guess=False)
        elif found is not None and found.shape == layer.shape:
            layer = replace(found, name=layer.name, weight=layer.weight)
        settled.append(layer)
    return tuple(settled)


def _from_architecture(
    network: Network,
    checkpoint: Checkpoint,
    architecture: Architecture,
    input_shape: tuple[int, ...] | None = None,
) -> Network:
    if checkpoint.quantized:
        raise CheckpointError(describe(checkpoint.path, checkpoint.quantized))
    dense = architecture.build()
    checkpoint = as_model_has_it(checkpoint, dense, architecture)
    network = replace(network, tensors=checkpoint.tensors, checkpoint=checkpoint, notes=checkpoint.notes)
    module = fit(dense, checkpoint, architecture.name)
    header = checkpoint.header
    inputs = one_input(input_shape or (header.input_shape if header else None)) or architecture.inputs
    return _with_module(replace(network, architecture=architecture), module, inputs)


def own_architecture(checkpoint: Checkpoint) -> Architecture | None:
    """The architecture that a folder's config.json describes, where transformers or timm knows it."""
    return architecture_in(checkpoint.path) if checkpoint.format == "folder" and checkpoint.path.is_dir() else None


def architecture_of(
    checkpoint: Checkpoint, model: str | None = None, model_args: Mapping[str, Any] | None = None
) -> Architecture | None:
    """The architecture that the user or the file's header names, or None.

    A header is data from somewhere else: it may name a library's model, but never makes a Python file run.
    """
    if model is not None:
        return find_architecture(model, model_args)
    header = checkpoint.header
    if header is None or header.model is None or ".py:" in header.model:
        return None
    return find_architecture(header.model, header.model_args)


def refuse_quantized(network: Network, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
    """Raise CheckpointError when layers that the patterns choose are stored quantized, embeddings aside."""
    checkpoint = network.checkpoint
    chosen = {
        name: layer
        for name, layer in (checkpoint.quantized if checkpoint else {}).items()
        if (not include or first_match(include, name)) and not first_match(exclude, name) and not _is_embedding(name)
    }
    if chosen:
        raise CheckpointError(f"{describe(network.name, chosen)}; --exclude leaves these layers as they are")


def _is_embedding(name: str) -> bool:
    """Whether the layer `name` would stay dense by its name alone; the shape of its codes says nothing."""
    return layers_of_tensors({f"{name}.weight": (2, 2)})[0].kind == "embedding"


def _by_dtype(layer: Layer, network: Network) -> Layer:
    """`layer`, kept dense when its weight is not made of real numbers."""
    ref = network.tensors.get(layer.weight)
    for quantized in network.checkpoint.quantized.values() if network.checkpoint else ():
        if quantized.weight == layer.weight:
            return replace(layer, kind="quantized", dense_reason=f"quantized by {quantized.method}", guess=False)
    if ref is None or ref.dtype.is_floating_point:
        return layer
    kind = "complex" if ref.dtype.is_complex else "integer"
    return replace(layer, kind=kind, dense_reason=f"{kind} numbers: only real weights are factorized", guess=False)


def _from_graph(network: Network, graph: "Graph", model: str | None, input_shape: tuple[int, ...] | None) -> Network:
    from lrconvert.onnx_graph.cost import trace_graph, uncounted
    from lrconvert.onnx_graph.inputs import fixed_shape

    if model is not None:
        raise UsageError(f"{network.name} is a graph and needs no model: leave --model out")
    layers = tuple(weight.layer for weight in graph.weights)
    header = network.checkpoint.header if network.checkpoint else None
    quantized = sum(layer.num_params for layer in layers if layer.kind == "quantized")
    shape = input_shape or (header.input_shape if header else None) or fixed_shape(graph)
    found, notes = None, network.notes
    try:
        found = trace_graph(graph, shape)
        if others := uncounted(graph):
            notes = (*notes, f"MACs are counted without those of {', '.join(others)}")
    except ModelError as error:
        notes = (*notes, f"no MACs: {error}")
    return replace(
        network,
        layers=layers,
        order="execution",
        num_params=count_parameters(network.tensors) + quantized,
        trace=found,
        inputs=one_input(shape),
        notes=notes,
    )


def _from_file_alone(network: Network) -> Network:
    tensors = network.tensors
    shapes = {key: ref.shape for key, ref in tensors.items() if ref.dtype.is_floating_point or ref.dtype.is_complex}
    layers = tuple(_tied(_by_dtype(layer, network), tensors) for layer in layers_of_tensors(shapes))
    # Listed, so that patterns can name them, and reports say why they stay as they are.
    codes = network.checkpoint.quantized.items() if network.checkpoint else ()
    layers += tuple(
        _by_dtype(Layer(name, layer.weight, "quantized", tensors[layer.weight].shape, evidence="shape"), network)
        for name, layer in codes
        if layer.weight not in shapes
    )
    notes = network.notes
    if len(layers) > 2 and list(shapes) == sorted(shapes):
        # As the safetensors library writes them. First and last would then be first and last in the alphabet.
        layers = tuple(sorted(layers, key=_likely_place))
        notes = (*notes, "keys are sorted by name: stem and head are recognised by shape and name; --model settles it")
    return replace(network, layers=layers, num_params=count_parameters(network.tensors), notes=notes)


_HEAD = re.compile(r"(?:\w+\.)?(?:fc|heads?|classifier|lm_head|logits|last_linear)(?:\.|$)")


def _likely_place(layer: Layer) -> tuple[int, list[tuple[int, str]]]:
    """Where a layer probably stands: image or sound enters by few channels, a head is called so, and 2 precedes 10."""
    is_stem = layer.kind.startswith("conv") and len(layer.shape) > 2 and layer.shape[1] <= 4 and not layer.dense_reason
    place = 0 if is_stem else 2 if _HEAD.match(layer.name) else 1
    return place, [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", layer.name)]


def _tied(layer: Layer, tensors: Mapping[str, TensorRef]) -> Layer:
    """`layer`, kept dense when the file stores its weight only once for several keys."""
    ref = tensors.get(layer.weight)
    others = [key for key, other in tensors.items() if other.alias_of == layer.weight]
    first = (ref.alias_of if ref else None) or next(iter(others), None)
    if not first or (layer.dense_reason and not layer.guess):
        return layer
    return replace(layer, dense_reason=f"shared with {first}", guess=False)


def _own_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The input shape that a live timm model names itself."""
    config = getattr(module, "pretrained_cfg", None)
    shape = config.get("input_size") if isinstance(config, dict) else None
    return tuple(shape) if shape else None


def _with_module(network: Network, module: nn.Module, inputs: Inputs | None) -> Network:
    layers = tuple(_tied(_by_dtype(layer, network), network.tensors) for layer in layers_of_module(module))
    network = replace(
        network,
        layers=layers,
        module=module,
        num_params=sum(parameter.numel() for parameter in module.parameters()),
        inputs=inputs,
    )
    if inputs is None:
        return replace(network, notes=(*network.notes, "MACs and execution order need --input-shape"))
    try:
        found = trace(module, inputs)
    except Exception as error:
        # Any model may fail on the meta device, and all that is lost is the order and the MACs.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return replace(network, notes=(*network.notes, f"no MACs and no execution order: the model failed ({reason})"))
    ordered = _in_execution_order(layers, module, found)
    far = sum(
        layer.owner not in found.positions for layer in ordered if layer.kind in LAYOUTS and not layer.dense_reason
    )
    if far:
        given = ", ".join(each.name or "one input" for each in inputs)
        note = (
            f"MACs are those of a pass with {given}: {far} weights stand in parts of the network that it does not reach"
        )
        network = replace(network, notes=(*network.notes, note))
    return replace(network, layers=ordered, order="execution", trace=found)


def _in_execution_order(layers: tuple[Layer, ...], module: nn.Module, found: Trace) -> tuple[Layer, ...]:
    """Called layers in the order of their first call; the others follow the layer registered before them."""
    turn = {name: index for index, name in enumerate(found.positions)}
    last, keyed = -1, []
    for layer in layers:
        if layer.owner in turn:
            last = turn[layer.owner]
        elif layer.kind in LAYOUTS and not layer.dense_reason and _reached(layer.owner, module, found.called):
            layer = replace(layer, dense_reason="never called in a forward pass")
        keyed.append((last, layer))
    return tuple(layer for _, layer in sorted(keyed, key=lambda pair: pair[0]))


def _reached(owner: str, model: nn.Module, called: frozenset[str]) -> bool:
    """Whether a forward pass came to where the layer `owner` stands, so that not calling it means something.

    Then its parent may read the weight itself. It means nothing in a part of the network that these inputs do not go
    through: what looks at images, where the inputs are texts.
    """
    parent = owner
    while parent:
        parent = parent.rpartition(".")[0]
        module = model.get_submodule(parent)
        # Lists of modules are not called by anybody.
        if type(module).forward is not nn.Module.forward:
            inside = f"{parent}." if parent else ""
            return parent in called or any(name.startswith(inside) for name in called)
    return True

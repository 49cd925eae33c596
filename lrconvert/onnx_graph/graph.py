"""An ONNX file: its weights as layers and tensors, and the graphs that a plan makes of it."""

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto, helper
from torch import Tensor

from lrconvert.errors import CheckpointError, PlanError
from lrconvert.onnx_graph.dense import put_dense
from lrconvert.onnx_graph.edit import Edit, constants_of
from lrconvert.onnx_graph.factors import FactorNames, factor_names, put_factors
from lrconvert.onnx_graph.scopes import STANDARD, Scopes, scopes_of
from lrconvert.onnx_graph.tensors import data_place, is_external, ref_of
from lrconvert.onnx_graph.weights import Weight, keyed, matrices, product_of, weights_of
from lrconvert.plan import LayerPlan, Plan
from lrconvert.plan_check import responses_of
from lrconvert.response import Response
from lrconvert.rewrite import CPU, Rewrite, moving
from lrconvert.spectrum import factors_of
from lrconvert.tensors import TensorRef

# Beside the header, the names of the factors by weight: they are what the header's plan cannot know.
FACTORS_KEY = "lrconvert.factors"
# Sizes of open dimensions by name, which an exporter took for its examples: MACs and times are of these.
LENGTHS_KEY = "lrconvert.lengths"
# Gemm without a bias, which the first of two needs, came with opset 11.
OLDEST_OPSET = 11


@dataclass(frozen=True)
class Draft:
    """A graph to be saved, some of whose tensors are still to be computed.

    Attributes:
        model: the graph.
        targets: key to (graph, tensor) of what `steps` make.
        steps: what computes them.
        folder: where external data of the model's other tensors is.
    """

    model: ModelProto
    targets: dict[str, tuple[GraphProto, TensorProto]]
    steps: list[Rewrite]
    folder: Path


class Graph:
    """An ONNX file that has been parsed, but for weights that it keeps in another file.

    Args:
        path: of the file.

    Raises:
        CheckpointError: it is no ONNX file, a damaged one, or its external data is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = _parse(path)
        self.scopes: Scopes = scopes_of(self.model)
        self.weights: tuple[Weight, ...] = weights_of(self.scopes)
        for value in self.scopes.values:
            if value.tensor is not None and is_external(value.tensor):
                data_place(value.tensor, path.parent, str(path))

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return next((int(each.version) for each in self.model.opset_import if each.domain in STANDARD), 0)

    @property
    def metadata(self) -> dict[str, str]:
        """What is noted in the file."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @property
    def lengths(self) -> dict[str, int]:
        """Sizes to try for open dimensions, by name, where the file says any."""
        try:
            noted = dict(json.loads(self.metadata.get(LENGTHS_KEY, "{}")))
        except (TypeError, ValueError):
            return {}
        return {name: size for name, size in noted.items() if isinstance(size, int) and size > 0}

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, and those that hold its external data."""
        tensors = [value.tensor for value in self.scopes.values if value.tensor is not None]
        beside = [data_place(each, self.path.parent, str(self.path))[0] for each in tensors if is_external(each)]
        return tuple(dict.fromkeys([self.path, *beside]))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left aside."""
        if not self.model.functions:
            return ()
        return (f"{len(self.model.functions)} functions of the graph's own are left as they are",)

    def tensors(self) -> dict[str, TensorRef]:
        """Every constant but single numbers, which are settings; weights in their layer's shape, out first."""
        weights = {id(weight.value): weight for weight in self.weights}
        return {
            key: self._out_first(weights[id(value)]) if id(value) in weights else self._ref(value.tensor)
            for key, value in keyed(self.scopes, self.weights)
            if value.tensor is not None and value.tensor.dims
        }

    def check(self, plan: Plan) -> dict[str, Weight]:
        """The weights that `plan` factorizes, by layer name.

        Raises:
            PlanError: the plan is not one for this graph.
        """
        known = {weight.layer.name: weight for weight in self.weights}
        for decision in plan.low_rank:
            layer = known[decision.name].layer if decision.name in known else None
            if layer is None:
                raise PlanError(f"the plan factorizes {decision.name}, but the graph has no such weight")
            if layer.dense_reason:
                raise PlanError(f"{layer.name} cannot be factorized: {layer.dense_reason}")
            if (layer.kind, layer.shape) == (decision.kind, decision.shape) and layer.groups != decision.groups:
                raise PlanError(f"{layer.name}: the weights of a graph are not split in parts; leave --split out")
            found, wanted = ((each.kind, each.shape, each.groups) for each in (layer, decision))
            if found != wanted:
                raise PlanError(f"{layer.name}: the plan says {wanted}, the graph {found} (kind, shape, groups)")
            if decision.rank is None or decision.rank > layer.full_rank:
                raise PlanError(f"{layer.name}: rank {decision.rank} is not from 1 to full rank {layer.full_rank}")
            if decision.norm or decision.view != "channel" or decision.pivoted:
                raise PlanError(
                    f"{layer.name}: a graph takes no norm between factors, no view but channel, no pivoted factors"
                )
        return {decision.name: known[decision.name] for decision in plan.low_rank}

    def factorized(
        self, plan: Plan, device: torch.device = CPU, responses: Mapping[str, Response] | None = None
    ) -> Draft:
        """The graph with factors in the place of the weights that `plan` names.

        Args:
            plan: what to do.
            device: where to compute.
            responses: by layer name, for the layers that the plan wants data-aware.

        Raises:
            PlanError: the plan is not one for this graph, or needs a response that is not there.
            CheckpointError: its operators are too old.
        """
        if self.opset < OLDEST_OPSET:
            raise CheckpointError(
                f"{self.path}: opset {self.opset} is too old, {OLDEST_OPSET} is needed; convert it with "
                f"onnx.version_converter.convert_version(model, {OLDEST_OPSET})"
            )
        self.check(plan)
        fitting = responses_of(plan, responses)
        fresh = Graph(self.path)
        weights = fresh.check(plan)
        edit = Edit(fresh.model, fresh.scopes)
        steps, names = [], {}
        for layer in plan.low_rank:
            assert layer.rank is not None
            names[layer.weight] = factor_names(weights[layer.name], edit)
            put_factors(edit, weights[layer.name], layer.rank, names[layer.weight])
            response = fitting.get(layer.name)
            steps.append(self._factorizing(weights[layer.name], layer, names[layer.weight], device, response))
        edit.apply()
        set_note(fresh.model, FACTORS_KEY, json.dumps({key: astuple(each) for key, each in names.items()}))
        constants = constants_of(fresh.model)
        targets = {name: constants[name] for step in steps for name in step.outputs}
        return Draft(fresh.model, targets, steps, self.path.parent)

    def with_products(self, plan: Plan, small: "Graph") -> Draft:
        """This graph, with the products of the factors in `small` as its weights: what `small` should compute.

        Biases that make up for the errors of their weights are those of `small` too.
        """
        fresh = Graph(self.path)
        weights, names = fresh.check(plan), small.factor_names()
        steps, targets = [], {}
        for layer in plan.low_rank:
            weight, pair = weights[layer.name], names[layer.weight]
            assert weight.value.tensor is not None
            targets[layer.weight] = weight.value.graph, weight.value.tensor
            steps.append(small._multiplying(layer, pair, layer.weight, weight.stored_shape))
            if layer.data_aware and weight.bias is not None and weight.bias.tensor is not None:
                name = weight.bias.name
                targets[name] = weight.bias.graph, weight.bias.tensor
                steps.append(moving(name, small._ref(constants_of(small.model)[name][1]), name))
        return Draft(fresh.model, targets, steps, self.path.parent)

    def merged(self, plan: Plan) -> Draft:
        """The graph without factors: the inverse of `factorized`.

        Raises:
            PlanError: the factors are not in the graph as `factorized` puts them there.
        """
        fresh = Graph(self.path)
        edit = Edit(fresh.model, fresh.scopes)
        names, steps = self.factor_names(), []
        for layer in plan.low_rank:
            if layer.weight not in names:
                raise PlanError(
                    f"{self.path}: the graph does not say which of its nodes are factors of {layer.name}; if it was "
                    "exported from a factorized model, multiply that out (lrconvert export MODEL --format dense) and "
                    "export it again"
                )
            name, shape = put_dense(edit, layer, names[layer.weight])
            steps.append(self._multiplying(layer, names[layer.weight], name, shape))
        edit.apply()
        set_note(fresh.model, FACTORS_KEY, None)
        constants = constants_of(fresh.model)
        return Draft(
            fresh.model, {key: constants[key] for step in steps for key in step.outputs}, steps, self.path.parent
        )

    def factor_names(self) -> dict[str, FactorNames]:
        """Names of the factors in this graph, by the key of the weight that they replaced."""
        try:
            noted = json.loads(self.metadata.get(FACTORS_KEY, "{}"))
            return {
                str(key): FactorNames(str(left), str(right), bool(first)) for key, (left, right, first) in noted.items()
            }
        except (ValueError, AttributeError, TypeError):
            raise CheckpointError(f"{self.path}: what it notes under {FACTORS_KEY} cannot be read") from None

    def dense_keys(self, plan: Plan | None) -> Mapping[str, LayerPlan | None]:
        """Key of every weight of the merged graph, to the decision for it where it is factorized here."""
        names = self.factor_names()
        factors = {name for pair in names.values() for name in (pair.left, pair.right)}
        dense = {weight.layer.weight: None for weight in self.weights if weight.layer.weight not in factors}
        # A graph that was exported from a factorized model has a plan too, but no factors of ours.
        return dense | {layer.weight: layer for layer in (plan.low_rank if plan else ()) if layer.weight in names}

    def merged_weight(self, layer: LayerPlan) -> Tensor:
        """The product of the factors of `layer`, in the layer's shape."""
        names = self.factor_names()[layer.weight]
        shape = layer.shape[::-1] if names.in_first else layer.shape
        stored = self._multiplying(layer, names, layer.weight, shape).make()[layer.weight]
        return stored.mT if names.in_first else stored

    def _ref(self, tensor: TensorProto) -> TensorRef:
        return ref_of(tensor, self.path.parent, str(self.path))

    def _out_first(self, weight: Weight) -> TensorRef:
        assert weight.value.tensor is not None
        stored = self._ref(weight.value.tensor)

        def read() -> Tensor:
            tensor = weight.out_first(stored.read())
            # Integers of quantized weights have no spectrum in their own arithmetic.
            return tensor if tensor.is_floating_point() else tensor.float()

        return TensorRef(weight.layer.shape, stored.dtype, read)

    def _factorizing(
        self, weight: Weight, layer: LayerPlan, names: FactorNames, device: torch.device, response: Response | None
    ) -> Rewrite:
        assert layer.rank is not None
        mine = next(each for each in self.weights if each.layer == weight.layer)
        rank, ref = layer.rank, self._out_first(mine)
        tensor = mine.bias.tensor if mine.bias is not None and response is not None else None
        bias = None if tensor is None or mine.bias is None else (mine.bias.name, self._ref(tensor))

        def make() -> dict[str, Tensor]:
            dense = matrices(ref.read().to(device), layer.groups)
            if response is None:
                u, v = factors_of(dense, rank, layer.name, layer.error)
            else:
                u, v, shift = response.factors(dense, rank)
            left, right = weight.stored_factors(u.cpu(), v.cpu(), rank)
            made = {names.left: left, names.right: right}
            if bias is not None:
                name, old = bias
                made[name] = (old.read().double() + shift.reshape(old.shape)).to(old.dtype)
            return made

        shapes = dict(zip((names.left, names.right), weight.factor_shapes(rank), strict=True))
        outputs = {key: (shape, ref.dtype) for key, shape in shapes.items()}
        if bias is not None:
            outputs[bias[0]] = bias[1].shape, bias[1].dtype
        return Rewrite(layer.weight, outputs, ref.numel, make)

    def _multiplying(self, layer: LayerPlan, names: FactorNames, key: str, shape: tuple[int, ...]) -> Rewrite:
        constants = {value.name: value.tensor for value in self.scopes.values}
        tensors = constants.get(names.left), constants.get(names.right)
        if tensors[0] is None or tensors[1] is None or layer.rank is None:
            raise PlanError(f"{self.path}: the factors of {layer.name} are not in it")
        left, right = self._ref(tensors[0]), self._ref(tensors[1])

        def make() -> dict[str, Tensor]:
            return {key: product_of(left.read(), right.read(), layer, shape)}

        return Rewrite(key, {key: (shape, left.dtype)}, layer.layer.num_params, make)


def _parse(path: Path) -> ModelProto:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path}: not an ONNX graph, or a damaged one ({reason}); copy it again") from None
    if not model.ir_version or not model.graph.node:
        raise CheckpointError(f"{path}: not an ONNX graph, or a damaged one (it has no operators); copy it again")
    return model


def set_note(model: ModelProto, key: str, text: str | None) -> None:
    """Set a metadata entry of `model`, or remove it."""
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
    helper.set_model_props(model, kept if text is None else kept | {key: text})

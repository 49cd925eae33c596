"""torchvision's networks: factorized, loaded on meta and strictly, equal to the merged dense network, ONNX equal."""

import copy

import pytest
import torch
from helpers import assert_close, run_seeded

import lrconvert
from lrconvert.cost import trace
from lrconvert.layers import LowRank
from lrconvert.layers.survey import layers_of_module
from lrconvert.models import find_architecture
from lrconvert.plan import LayerPlan, Plan
from lrconvert.surgery import reshape

# name to (input size, arguments)
NETWORKS = {
    "resnet18": (64, {}),
    "resnet50": (64, {}),
    "vgg16_bn": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "mobilenet_v3_large": (64, {}),
    "convnext_tiny": (64, {}),
    "vit_b_16": (64, {"image_size": 64}),
    "mnasnet0_5": (64, {}),  # insists on a version in its state dict
    "swin_t": (64, {}),
    "swin_v2_t": (64, {}),
    "regnet_x_400mf": (64, {}),  # computes with tensors while it is built
}
# Those that are factorized once more, with pivots.
PIVOTED = ("resnet50", "convnext_tiny", "vit_b_16", "swin_t")


def dense_model(name):
    import torchvision

    model = torchvision.models.get_model(name, weights=None, **NETWORKS[name][1])
    if name.startswith("vit"):
        # torchvision initialises this head with zeros, and zero equals anything.
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


@pytest.fixture(scope="module", params=[*NETWORKS, *(f"{name} pivoted" for name in PIVOTED)])
def network(request, short_lived_folder):
    """(name, factorized file, merged file) at rank ratio 1/4 in every layer that can be."""
    name, _, pivoted = request.param.partition(" ")
    with short_lived_folder() as folder:
        torch.manual_seed(0)
        torch.save(dense_model(name).state_dict(), folder / "dense.pt")
        record = lrconvert.factorize(
            folder / "dense.pt",
            "rank_ratio=0.25",
            output=folder / "small.safetensors",
            model=f"torchvision/{name}",
            model_args=NETWORKS[name][1],
            keep_first=0,
            keep_last=False,
            pivoted=bool(pivoted),
            exclude=["classifier.[03]"] if name == "vgg16_bn" else [],  # large, and like any other linear layer
        )
        lrconvert.export(folder / "small.safetensors", folder / "merged.safetensors", "dense")
        yield name, folder, record


def test_equal_to_the_merged_network(network):
    name, folder, record = network
    small = lrconvert.load(folder / "small.safetensors")
    merged = lrconvert.load(folder / "merged.safetensors")
    assert sum(parameter.numel() for parameter in small.parameters()) == record.num_params_after
    assert sum(isinstance(module, LowRank) for module in small.modules()) == sum(
        row.rank is not None for row in record.layers
    )
    inputs = torch.randn(4, 3, NETWORKS[name][0], NETWORKS[name][0])
    assert_close(run_seeded(small.eval(), inputs), run_seeded(merged.eval(), inputs), 1e-5)
    # Batch statistics of random networks amplify float32 rounding (the dense network itself is up to 4e-5 away from
    # its float64 self), so the identity in train mode is tested in float64, merged there too.
    small = small.double().train()
    merged = lrconvert.merge(copy.deepcopy(small))
    assert_close(run_seeded(small, inputs.double()), run_seeded(merged, inputs.double()), 1e-10)


def test_onnx_is_equal_to_the_network(network, tmp_path):
    name, folder, _ = network
    record = lrconvert.export(
        folder / "small.safetensors",
        tmp_path / "small.onnx",
        "onnx",
        input_shape=(3, NETWORKS[name][0], NETWORKS[name][0]),
    )
    assert record.batch_sizes == (1, 3)
    assert record.difference is not None
    assert record.difference < 1e-4
    assert record.nbytes < (folder / "merged.safetensors").stat().st_size


def test_macs_of_the_record_are_those_of_the_reshaped_network(network):
    name, folder, record = network
    from lrconvert.network import open_network

    size = NETWORKS[name][0]
    small = open_network(folder / "small.safetensors", input_shape=(3, size, size))
    merged = open_network(folder / "merged.safetensors", input_shape=(3, size, size))
    assert small.trace is not None
    assert merged.trace is not None
    positions = merged.trace.positions
    saved = sum(
        # attention is replaced as a whole
        positions[row.name.rpartition(".")[0] if row.kind == "attention" else row.name]
        * (row.num_params_before - row.num_params_after)
        for row in record.layers
        if row.rank is not None
    )
    assert small.trace.macs == merged.trace.macs - saved


def test_resnet50_with_layer4_at_a_quarter_has_pufferfish_s_counts(tmp_path):
    torch.save(dense_model("resnet50").state_dict(), tmp_path / "dense.pt")
    record = lrconvert.factorize(
        tmp_path / "dense.pt",
        "rank_ratio=0.25",
        include=["layer4*"],
        model="torchvision/resnet50",
        output=tmp_path / "small.safetensors",
    )
    assert (record.num_params_before, record.num_params_after) == (25_557_032, 15_202_344)
    assert (record.macs_before, record.macs_after) == (4_089_184_256, 3_533_635_584)
    small = lrconvert.load(tmp_path / "small.safetensors")
    assert sum(parameter.numel() for parameter in small.parameters()) == 15_202_344
    merged = lrconvert.merge(copy.deepcopy(small))
    inputs = torch.randn(4, 3, 224, 224)
    assert_close(run_seeded(small.eval(), inputs), run_seeded(merged.eval(), inputs), 1e-5)


def test_what_must_stay_dense_says_why():
    plan = lrconvert.make_plan(dense_model("mobilenet_v3_small"), "rank_ratio=0.25", keep_first=0, keep_last=False)
    reasons = {layer.name: layer.reason for layer in plan.layers if layer.rank is None}
    assert reasons["features.1.block.0.0"].startswith("depthwise")


def test_all_linear_layers_and_convolutions_of_swin_are_factorized():
    plan = lrconvert.make_plan(dense_model("swin_t"), "rank_ratio=0.25", keep_first=0, keep_last=False)
    left = {layer.name.rpartition(".")[2] for layer in plan.layers if layer.rank is None}
    assert left == {"relative_position_bias_table"}


def test_execution_order_is_not_the_order_of_registration(tmp_path):
    torch.save(dense_model("resnet18").state_dict(), tmp_path / "dense.pt")
    analysis = lrconvert.analyze(tmp_path / "dense.pt", model="torchvision/resnet18", include=["layer2.0*"])
    assert analysis.network.order == "execution"
    names = [layer.name for layer in analysis.network.layers]
    assert names[0] == "conv1"
    assert names[-1] == "fc"
    assert names.index("layer2.0.downsample.0") > names.index("layer2.0.conv2")


# What the models have only where published weights are loaded, and what detection and optical flow have no shape for.
PUBLISHED = {"vit_h_14": {"image_size": 518}, "fcn": {"aux_loss": True}, "deeplabv3": {"aux_loss": True}}
NO_SHAPE = ("rcnn", "retinanet", "fcos", "ssd", "raft")


def test_multiply_accumulates_are_those_torchvision_publishes():
    """Of every classifier, segmentation and video model; and with factors they are what the formula says."""
    from torchvision import models

    counted = {}
    for name in models.list_models():
        if any(part in name for part in NO_SHAPE):
            assert find_architecture(f"torchvision/{name}").inputs is None
            continue
        given = next((args for part, args in PUBLISHED.items() if name.startswith(part)), {})
        architecture = find_architecture(f"torchvision/{name}", given)
        model = architecture.build()
        dense = trace(model, architecture.inputs)
        published = models.get_model_weights(name).DEFAULT.meta["_ops"]  # in units of 1e9, rounded to three decimals
        assert dense.macs / 1e9 == pytest.approx(published, abs=6e-4), name
        layers = [
            layer for layer in layers_of_module(model) if not layer.dense_reason and layer.owner in dense.positions
        ]
        plan = Plan(layers=tuple(LayerPlan.of(layer, max(1, layer.full_rank // 4)) for layer in layers))
        change = sum(
            decision.layer.low_rank_macs(dense.positions[decision.layer.owner], decision.rank)
            - decision.layer.macs(dense.positions[decision.layer.owner])
            for decision in plan.layers
        )
        counted[name] = trace(reshape(model, plan), architecture.inputs).macs
        assert counted[name] == dense.macs + change, name
    assert len(counted) > 90

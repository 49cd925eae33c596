"""The Python API: the same verbs on live models and on files."""

import copy

import pytest
import torch
from helpers import assert_close
from torch import nn

import lrconvert
from lrconvert.errors import ModelError, NothingToCompressError, PlanError, UsageError
from lrconvert.layers import LowRank


def test_a_live_model_is_factorized_in_place_and_merged_again(small_model):
    inputs = torch.randn(2, 3, 8, 8)
    plan = lrconvert.make_plan(small_model, "rank_ratio=0.25", input_shape=(3, 8, 8))
    assert plan.order == "execution"
    assert {layer.name for layer in plan.low_rank} == {"3", "5"}
    same = lrconvert.factorize(small_model, plan)
    assert same is small_model
    assert isinstance(small_model[3], LowRank)
    before = small_model.eval()(inputs).detach()
    assert lrconvert.merge(small_model) is small_model
    assert not any(isinstance(module, LowRank) for module in small_model.modules())
    assert_close(small_model(inputs).detach(), before)


def test_live_model_and_file_give_the_same_tensors(small_model, tmp_path):
    torch.save(small_model.state_dict(), tmp_path / "dense.pt")
    plan = lrconvert.make_plan(small_model, "energy=0.8")
    lrconvert.factorize(tmp_path / "dense.pt", plan, output=tmp_path / "small.safetensors")
    live = lrconvert.factorize(copy.deepcopy(small_model), plan)
    loaded = lrconvert.load(tmp_path / "small.safetensors", small_model)
    assert loaded is small_model
    for (key, mine), (other, theirs) in zip(live.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(mine, theirs)


def test_a_model_that_is_one_layer():
    layer = nn.Linear(30, 20)
    weight = layer.weight.detach().clone()
    low_rank = lrconvert.factorize(layer, "rank=4")
    assert isinstance(low_rank, LowRank)
    merged = lrconvert.merge(low_rank)
    tail = torch.linalg.svdvals(weight.double())[4:]
    assert float((merged.weight.detach() - weight).norm()) == pytest.approx(float(tail.norm()), rel=1e-4)


def test_save_and_load_name_the_architecture(tmp_path):
    import torchvision

    model = torchvision.models.mobilenet_v3_small(num_classes=7)
    lrconvert.factorize(model, "rank_ratio=0.25")
    lrconvert.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="names no architecture"):
        lrconvert.load(tmp_path / "m.safetensors")
    loaded = lrconvert.load(tmp_path / "m.safetensors", "torchvision/mobilenet_v3_small", model_args={"num_classes": 7})
    inputs = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(inputs), model.eval()(inputs))
    assert not loaded.training


def test_a_live_model_that_does_not_match_is_not_changed(small_model, tmp_path):
    torch.save(small_model.state_dict(), tmp_path / "dense.pt")
    lrconvert.factorize(tmp_path / "dense.pt", "rank=4", output=tmp_path / "small.pt")
    other = nn.Sequential(*list(small_model)[:-1], nn.Linear(64, 11))
    with pytest.raises(ModelError, match=r"6\.weight: \(10, 64\) in the checkpoint, \(11, 64\) in Sequential"):
        lrconvert.load(tmp_path / "small.pt", other)
    assert not any(isinstance(module, LowRank) for module in other.modules())


class WithBuffers(nn.Module):
    """Has a buffer that no checkpoint holds: only its constructor makes it."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)
        self.two = nn.Linear(32, 32)
        self.register_buffer("scale", torch.arange(32.0), persistent=False)

    def forward(self, x):
        return self.two(self.one(x) * self.scale)


def test_buffers_that_are_not_saved_are_made_by_the_constructor(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text("from test_verbs_net import WithBuffers\n")
    import sys
    import types

    module = types.ModuleType("test_verbs_net")
    module.WithBuffers = WithBuffers
    monkeypatch.setitem(sys.modules, "test_verbs_net", module)
    model = WithBuffers()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    lrconvert.factorize(tmp_path / "dense.pt", "rank=4", output=tmp_path / "small.pt", keep_last=False)
    loaded = lrconvert.load(tmp_path / "small.pt", f"{tmp_path / 'net.py'}:WithBuffers")
    assert torch.equal(loaded.scale, model.scale)
    assert torch.isfinite(loaded(torch.randn(2, 32))).all()


def test_kinds_the_file_guessed_wrong_are_caught_when_loading(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 64, 1), nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 64, 1))
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    # from shapes alone the grouped convolution is suspected; naming it makes it an ungrouped one
    lrconvert.factorize(tmp_path / "dense.pt", "rank=4", output=tmp_path / "small.pt", include=["1"])
    with pytest.raises(PlanError, match=r"in 1 group\(s\), the model has .* in 2; factorize again with --model"):
        lrconvert.load(tmp_path / "small.pt", model)
    assert not any(isinstance(module, LowRank) for module in model.modules())


def test_an_encoder_layer_is_factorized_whole_from_its_file_alone(tmp_path):
    model = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    plan = lrconvert.make_plan(tmp_path / "dense.pt", "rank=8", keep_first=0, keep_last=False)
    assert {layer.name for layer in plan.low_rank} == {
        "linear1",
        "linear2",
        "self_attn.in_proj_weight",
        "self_attn.out_proj",
    }
    lrconvert.factorize(tmp_path / "dense.pt", plan, output=tmp_path / "small.pt")
    small = lrconvert.load(tmp_path / "small.pt", copy.deepcopy(model))
    merged = lrconvert.merge(copy.deepcopy(small))
    inputs = torch.randn(2, 5, 64)
    for training in (True, False):
        outputs = []
        for each in (small, merged):
            torch.manual_seed(1)
            with torch.no_grad():
                outputs.append(each.train(training)(inputs))
        assert_close(*outputs)


def test_the_fused_encoder_path_does_not_multiply_the_factors_out():
    from torch.utils.flop_counter import FlopCounterMode

    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True).eval()
    inputs = torch.randn(2, 5, 64)
    low_rank = lrconvert.factorize(copy.deepcopy(layer), "rank=8", keep_first=0, keep_last=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        low_rank(inputs)
    # the two factorized layers alone: 10 positions, rank 8, both directions; a product of factors would show as
    # 8 · 64 · 256 each
    counts = counter.get_flop_counts()
    ours = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(("linear1", "linear2")))
    assert ours == 2 * 2 * 10 * 8 * (64 + 256)


def test_an_analysis_can_be_planned_from_again_and_again(small_model):
    analysis = lrconvert.analyze(small_model, input_shape=(3, 8, 8))
    assert set(analysis.spectra) == {"0", "3", "5", "6"}
    for rule in ("rank_ratio=0.25", "energy=0.8"):
        assert lrconvert.make_plan(analysis, rule) == lrconvert.make_plan(small_model, rule, input_shape=(3, 8, 8))


def test_what_cannot_be_asked(small_model, tmp_path):
    with pytest.raises(NothingToCompressError, match="no layer to factorize"):
        lrconvert.factorize(small_model, "rank=4", exclude=["*"])
    with pytest.raises(UsageError, match="in place"):
        lrconvert.factorize(small_model, "rank=4", output=tmp_path / "x.pt")
    torch.save(small_model.state_dict(), tmp_path / "dense.pt")
    with pytest.raises(UsageError, match="needs an output path"):
        lrconvert.factorize(tmp_path / "dense.pt", "rank=4")
    plan = lrconvert.make_plan(small_model, "rank=4")
    with pytest.raises(UsageError, match="a finished plan takes no more settings"):
        lrconvert.factorize(small_model, plan, keep_first=2)
    lrconvert.factorize(small_model, plan)
    with pytest.raises(PlanError):
        lrconvert.factorize(small_model, plan)


def test_compare_measures_outputs_and_latency(tmp_path):
    from lrconvert.models.zoo.digits_cnn import DigitsCNN

    lrconvert.save(DigitsCNN(width=16).eval(), tmp_path / "dense.safetensors", architecture="zoo/digits_cnn")
    with pytest.raises(ModelError, match=r"\(16, 1, 3, 3\) in the checkpoint, \(64, 1, 3, 3\) in zoo/digits_cnn"):
        lrconvert.load(tmp_path / "dense.safetensors")
    lrconvert.factorize(
        tmp_path / "dense.safetensors",
        "rank_ratio=0.25",
        output=tmp_path / "small.safetensors",
        model="zoo/digits_cnn",
        model_args={"width": 16},
    )
    record = lrconvert.compare(
        tmp_path / "dense.safetensors",
        tmp_path / "small.safetensors",
        model="zoo/digits_cnn",
        model_args={"width": 16},
    )
    assert record.output_difference is not None
    assert 0 < record.output_difference < 1
    assert record.second.latency_ms is not None
    assert record.second.macs is not None
    assert record.first.macs is not None
    assert record.second.macs < record.first.macs
    assert record.latency_note is not None
    assert record.latency_note.startswith("CPU")


def test_compare_takes_the_input_shape_from_either_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3))\n"
    )
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    settings = {"model": f"{tmp_path}/net.py:make", "keep_last": False}
    lrconvert.factorize(
        tmp_path / "dense.pt", "rank=8", output=tmp_path / "small.pt", input_shape=(3, 16, 16), **settings
    )
    record = lrconvert.compare(tmp_path / "dense.pt", tmp_path / "small.pt", model=settings["model"])
    assert record.first.macs == 32 * 27 * 14 * 14 + 32 * 32 * 9 * 12 * 12
    assert 0 < record.output_difference < 1

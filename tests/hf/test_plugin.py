"""Factorized folders inside transformers: from_pretrained, save_pretrained, training, generation, dense again."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import assert_close
from safetensors import safe_open

import lrconvert
import lrconvert.models.huggingface
from lrconvert.hf import hook
from lrconvert.layers import LowRank, low_rank_modules
from lrconvert.outputs import tensors_in

transformers = pytest.importorskip("transformers")
networks = pytest.importorskip("hf_networks")


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module", params=[*networks.NETWORKS, "bert pivoted", "gpt2 pivoted"])
def folder(request, short_lived_folder):
    """A folder with a dense model and a factorized one."""
    name, _, pivoted = request.param.partition(" ")
    with short_lived_folder() as folder:
        networks.build(name).save_pretrained(folder / "dense")
        lrconvert.factorize(folder / "dense", "rank_ratio=0.25", output=folder / "small", pivoted=bool(pivoted))
        yield folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The same, for one model."""
    folder = tmp_path_factory.mktemp("one")
    networks.build("bert").save_pretrained(folder / "dense")
    lrconvert.factorize(folder / "dense", "rank_ratio=0.25", output=folder / "small")
    return folder


def run(model, dtype=torch.float32):
    inputs = lrconvert.models.huggingface.inputs_of_live(model)
    torch.manual_seed(0)
    named = {each.name: each.example(2, dtype, seed=number) for number, each in enumerate(inputs)}
    with torch.no_grad():
        return torch.cat([tensor.float().flatten() for tensor in tensors_in(model(**named))])


def check_same(one, other):
    """To the last bit, in the weights and in what is computed."""
    state, wanted = one.state_dict(), other.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    # Copies: how a product is rounded depends on where its weights lie, and those of a mapped file lie anywhere.
    assert torch.equal(run(copy.deepcopy(one)), run(copy.deepcopy(other)))


def low_rank(model):
    return sum(isinstance(module, LowRank) for module in model.modules())


def test_from_pretrained_and_save_pretrained(folder, tmp_path):
    mine = lrconvert.load(folder / "small")
    theirs, found = type(mine).from_pretrained(folder / "small", output_loading_info=True)
    assert not any(found.values())
    assert low_rank(theirs) == low_rank(mine) > 5
    assert run(mine).any()
    check_same(theirs, mine)
    theirs.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    check_same(type(mine).from_pretrained(tmp_path / "again"), mine)
    check_same(lrconvert.load(tmp_path / "again"), mine)
    # And what lrconvert loaded is saved as well.
    mine.save_pretrained(tmp_path / "mine")
    check_same(type(mine).from_pretrained(tmp_path / "mine"), mine)


def test_back_to_dense(folder, tmp_path):
    small = lrconvert.load(folder / "small")
    kind, want = type(small), run(small)
    dense = kind.from_pretrained(folder / "small").dequantize()
    assert not low_rank(dense)
    assert_close(run(dense), want, 1e-5)
    lrconvert.merge(small)
    for number, model in enumerate((dense, small)):
        model.save_pretrained(tmp_path / str(number))
        assert "quantization_config" not in json.loads((tmp_path / str(number) / "config.json").read_text())
        again, found = kind.from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert not any(found.values())
        assert_close(run(again), want, 1e-5)
    lrconvert.export(folder / "small", tmp_path / "merged", "dense")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert_close(run(kind.from_pretrained(tmp_path / "merged")), want, 1e-5)


def test_a_live_model_is_saved_as_what_it_is(folder, tmp_path):
    kind = type(lrconvert.load(folder / "dense"))
    model = lrconvert.factorize(kind.from_pretrained(folder / "dense"), "rank_ratio=0.25")
    model.save_pretrained(tmp_path / "live")
    assert_close(run(kind.from_pretrained(tmp_path / "live")), run(lrconvert.load(folder / "small")), 1e-5)


def test_it_trains_and_is_cast(folder, tmp_path):
    kind = type(lrconvert.load(folder / "small"))
    model = kind.from_pretrained(folder / "small").train()
    inputs = lrconvert.models.huggingface.inputs_of_live(model)
    named = {each.name: each.example(2, torch.float32) for each in inputs}
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = next(tensor for tensor in tensors_in(model(**named)) if tensor.requires_grad)
    first.square().mean().backward()
    factors = [
        module.get_parameter(path)
        for _, module in low_rank_modules(model)
        for weight in module.factored
        for path in module.counterparts(weight)
    ]
    assert factors
    assert all(factor.grad is not None for factor in factors)
    optimizer.step()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "trained")
    check_same(kind.from_pretrained(tmp_path / "trained"), model.eval())
    half = kind.from_pretrained(folder / "small", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.parameters()} == {torch.bfloat16}
    assert_close(run(half, torch.bfloat16), run(lrconvert.load(folder / "small")), 0.1)
    assert model.half().dtype == torch.float16


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper"])
def test_generation_and_ties(name, tmp_path):
    networks.build(name).save_pretrained(tmp_path / "dense")
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.5", output=tmp_path / "small")
    small = lrconvert.load(tmp_path / "small")
    head = small.get_output_embeddings().weight
    assert head is small.get_input_embeddings().weight
    inputs = lrconvert.models.huggingface.inputs_of_live(small)[0]
    start = inputs.example(2, torch.float32)
    start = start[:, :4] if start.dim() == 2 else start
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mine = small.generate(start, **settings)
    dense = lrconvert.merge(copy.deepcopy(small))
    assert torch.equal(mine, dense.generate(start, **settings))
    theirs = type(small).from_pretrained(tmp_path / "small")
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert torch.equal(mine, theirs.generate(start, **settings))


def test_heads_and_base_models(bert, tmp_path):
    small = lrconvert.load(bert / "small")
    ids = torch.randint(99, (2, 9))
    want = small.bert(ids)[0]
    base = transformers.AutoModel.from_pretrained(bert / "small")
    assert torch.equal(base(ids)[0], want)
    other = transformers.AutoModelForMaskedLM.from_pretrained(bert / "small")
    assert torch.equal(other.bert(ids)[0], want)
    # And the other way: a head on a base model.
    base.save_pretrained(tmp_path / "base")
    head = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(head.bert(ids)[0], want)
    assert torch.equal(lrconvert.load(tmp_path / "base")(ids)[0], want)


def test_what_is_written(bert):
    entry = json.loads((bert / "small" / "config.json").read_text())["quantization_config"]
    weight = "bert.encoder.layer.1.output.dense.weight"
    assert entry["quant_method"] == "lrconvert"
    assert entry["layers"][weight] == {"kind": "linear", "shape": [64, 96], "rank": 16, "groups": 1}
    with safe_open(bert / "small" / "model.safetensors", "pt") as file:
        assert file.get_slice(weight).get_shape() == [0]
    # lrconvert itself does not see the empty tensors.
    assert weight not in lrconvert.load(bert / "small").state_dict()
    assert lrconvert.info(bert / "small").model == "hf/BertForSequenceClassification"
    assert any("refuses it without" in note for note in lrconvert.info(bert / "small").notes)
    assert not any("transformers" in note for note in lrconvert.info(bert / "dense").notes)
    card = (bert / "small" / "README.md").read_text()
    assert "import lrconvert" in card
    assert "refuses" in card


def test_importing_transformers_survives_a_failed_registration(monkeypatch):
    def fail(name):
        raise ImportError("another version")

    monkeypatch.setattr("lrconvert.hf.hook.importlib.import_module", fail)
    with pytest.warns(UserWarning, match=r"could not register with transformers.*another version"):
        hook.install()


PROGRAM = """
import sys, transformers
transformers.utils.logging.disable_progress_bar()
{first}
model = transformers.AutoModel.from_pretrained({path!r})
assert type(model.encoder.layer[1].output.dense).__name__ == "LowRankLinear"
"""
ALONE = """
assert "lrconvert" not in sys.modules
try:
    transformers.AutoModel.from_pretrained({path!r})
except RuntimeError as error:
    print("refused:", error)
else:
    sys.exit("loaded without lrconvert")
import lrconvert
"""


def test_transformers_alone_refuses_and_a_later_import_helps(bert):
    path = str(bert / "small")
    program = PROGRAM.format(first=ALONE.format(path=path), path=path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout
    assert "Unknown quantization type, got lrconvert" in done.stderr


def test_an_earlier_import_helps(bert):
    program = "import lrconvert, sys\nassert 'torch' not in sys.modules\n"
    program += PROGRAM.format(first="", path=str(bert / "small"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""transformers' networks: found from their folder, factorized, equal to the merged dense network, ONNX equal."""

import json
import shutil

import onnx
import onnxruntime
import pytest
import torch
from helpers import assert_close

import lrconvert
from lrconvert.cost import trace
from lrconvert.errors import ModelError
from lrconvert.layers import low_rank_modules
from lrconvert.models import find_architecture
from lrconvert.surgery import reshape

transformers = pytest.importorskip("transformers")
networks = pytest.importorskip("hf_networks")

# Why layers of each stay dense at rank ratio 1/4, when the first and last need not: reason to number.
DENSE = {
    "bert": {"embedding": 3},
    "gpt2": {"embedding": 1, "shared": 1},
    "llama": {"shared": 1},
    "falcon": {"shared": 1},
    "t5": {"embedding": 2, "shared": 1},
    "whisper": {"embedding": 1, "shared": 1, "WhisperPositionalEmbedding": 1},
    "clip": {"embedding": 3},
    "mixtral": {"embedding": 1, "parameter": 2},  # the routers
    "gpt_oss": {"embedding": 1, "parameter": 6},  # and biases of experts
    "granite_moe": {"embedding": 1, "parameter": 2},
}
# Those whose files hold other tensors than the model.
CONVERTED = ("mixtral", "granite_moe")
# Those that are factorized once more, with pivots.
PIVOTED = ("gpt2", "llama", "t5")


@pytest.fixture(scope="module", params=[*networks.NETWORKS, *(f"{name} pivoted" for name in PIVOTED)])
def network(request, short_lived_folder):
    """(name, folder with dense, small and merged, record) at rank ratio 1/4 in every layer that can be."""
    name, _, pivoted = request.param.partition(" ")
    with short_lived_folder() as folder:
        networks.build(name).save_pretrained(folder / "dense")
        record = lrconvert.factorize(
            folder / "dense",
            "rank_ratio=0.25",
            output=folder / "small",
            keep_first=0,
            keep_last=False,
            pivoted=bool(pivoted),
        )
        lrconvert.export(folder / "small", folder / "merged", "dense")
        yield name, folder, record


def test_equal_to_the_merged_network(network):
    name, folder, record = network
    assert record.order == "execution"
    assert record.macs_after < record.macs_before
    assert [note for note in record.notes if "as hf/" not in note] == []
    assert bool(record.notes) is (name in CONVERTED)
    small, merged, dense = (lrconvert.load(folder / which) for which in ("small", "merged", "dense"))
    assert type(small) is type(merged) is type(networks.NETWORKS[name]())
    assert sum(parameter.numel() for parameter in small.parameters()) == record.num_params_after
    factorized = sum(row.rank is not None for row in record.layers)
    assert sum(len(module.factored) for _, module in low_rank_modules(small)) == factorized >= 8
    out = networks.run(small, folder / "dense")
    assert_close(out, networks.run(merged, folder / "dense"), 1e-5)
    with pytest.raises(AssertionError, match="relative difference"):
        assert_close(out, networks.run(dense, folder / "dense"), 1e-3)


def test_what_stays_dense_says_why(network):
    name, _, record = network
    reasons = {}
    for row in record.layers:
        if row.rank is None:
            word = row.reason.replace(":", "").split()[0]
            reasons[word] = reasons.get(word, 0) + 1
    assert reasons == DENSE[name]


def test_half_the_rank(network, tmp_path):
    _, folder, _ = network
    lrconvert.factorize(folder / "dense", "rank_ratio=0.5", output=tmp_path / "small")
    small = lrconvert.load(tmp_path / "small")
    out = networks.run(small, folder / "dense")
    assert_close(out, networks.run(lrconvert.merge(small), folder / "dense"), 1e-5)


def test_the_dense_folder_is_loaded_as_transformers_does(network):
    _, folder, _ = network
    mine = lrconvert.load(folder / "dense")
    theirs = type(mine).from_pretrained(folder / "dense")
    assert_close(networks.run(mine, folder / "dense"), networks.run(theirs, folder / "dense"), 1e-6)


def test_onnx_is_equal_to_the_network(network, tmp_path):
    _, folder, _ = network
    record = lrconvert.export(folder / "small", tmp_path / "small.onnx", "onnx")
    assert record.batch_sizes == (1, 3)
    assert record.difference < 1e-4
    assert record.notes == ()
    open_inputs = [each for each in find_architecture(f"hf/{folder}/dense").inputs if each.length]
    assert open_inputs
    given = onnx.load(tmp_path / "small.onnx").graph.input
    shapes = {each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in given}
    for each in open_inputs:
        assert record.lengths[each.length][0] == each.shape[0] > record.lengths[each.length][1]
        assert shapes[each.name] == ["batch", each.length]


def test_pt2_is_equal_to_the_network(network, tmp_path):
    name, folder, _ = network
    if name in ("bert", "gpt2", "t5"):  # one of each sort: a second or more each
        record = lrconvert.export(folder / "small", tmp_path / "small.pt2", "pt2")
        assert record.difference < 1e-5
        assert record.notes == ()
        assert len(record.lengths) == (2 if name == "t5" else 1)


@pytest.mark.parametrize(("length", "hidden"), [(1, 0), (9, 4), (30, 29)])
def test_a_graph_takes_texts_of_any_length(tmp_path, length, hidden):
    networks.build("bert").save_pretrained(tmp_path / "dense")
    lrconvert.export(tmp_path / "dense", tmp_path / "dense.onnx", "onnx")
    ids, mask = torch.randint(99, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, length - hidden :] = 0
    model, session = lrconvert.load(tmp_path / "dense"), onnxruntime.InferenceSession(tmp_path / "dense.onnx")
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
    (got,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert_close(torch.from_numpy(got), want, 1e-5)


def test_one_file_holds_its_configuration(tmp_path):
    networks.build("bert").save_pretrained(tmp_path / "dense")
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small.safetensors")
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    inputs = torch.randint(99, (2, 9))
    with torch.no_grad():
        want = lrconvert.load(tmp_path / "small")(inputs).logits
        shutil.rmtree(tmp_path / "dense")
        (tmp_path / "small").rename(tmp_path / "moved")
        (tmp_path / "small.safetensors").rename(tmp_path / "other.safetensors")
        assert torch.equal(lrconvert.load(tmp_path / "other.safetensors")(inputs).logits, want)
        assert torch.equal(lrconvert.load(tmp_path / "moved")(inputs).logits, want)


def test_arguments_change_the_configuration(tmp_path):
    networks.build("bert").save_pretrained(tmp_path)
    assert find_architecture(f"hf/{tmp_path}", {"num_labels": 7}).build().classifier.out_features == 7
    masked = find_architecture(f"hf/{tmp_path}", {"architecture": "BertForMaskedLM"})
    assert masked.name == "hf/BertForMaskedLM"
    assert type(masked.build()) is transformers.BertForMaskedLM
    again = find_architecture(masked.name, masked.args)
    assert again.args == masked.args
    assert again.inputs == masked.inputs


def test_dtype_is_kept(tmp_path):
    networks.build("gpt2").bfloat16().save_pretrained(tmp_path / "dense")
    lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    for folder in ("dense", "small"):
        model = lrconvert.load(tmp_path / folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_prefixes_are_put_right(tmp_path):
    model = networks.build("bert")
    model.bert.save_pretrained(tmp_path / "base")
    torch.save(model.state_dict(), tmp_path / "with_head.pt")
    small = lrconvert.factorize(tmp_path / "with_head.pt", "rank_ratio=0.25", model=f"hf/{tmp_path}/base", dry_run=True)
    assert any("prefix 'bert.' removed" in note for note in small.notes)
    assert small.model == "hf/BertModel"


def test_a_model_that_does_not_fit_is_read_from_the_file_alone(tmp_path):
    networks.build("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    analysis = lrconvert.analyze(tmp_path)
    assert any("read from the file alone: config.json names hf/Bert" in note for note in analysis.network.notes)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "not_in_transformers"}))
    assert lrconvert.analyze(tmp_path).network.architecture is None
    with pytest.raises(ModelError, match="not_in_transformers"):
        find_architecture(f"hf/{tmp_path}")


def _bart():
    depth = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _DEPTH.items()}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**networks.TEXT, d_model=64, **depth))


_DEPTH = {"layers": 2, "ffn_dim": 96, "attention_heads": 4}
# Models that look into a mask, or take clips or spectrograms.
OTHERS = {
    "bart": _bart,
    "dpr": lambda: transformers.DPRQuestionEncoder(transformers.DPRConfig(**networks.TEXT, **networks.SIZES)),
    "videomae": lambda: transformers.VideoMAEForVideoClassification(
        transformers.VideoMAEConfig(**networks.SIZES, image_size=32, patch_size=8, num_frames=4)
    ),
    "ast": lambda: transformers.ASTForAudioClassification(
        transformers.ASTConfig(**networks.SIZES, max_length=64, num_mel_bins=32, patch_size=8)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_inputs(name, tmp_path):
    torch.manual_seed(0)
    OTHERS[name]().eval().save_pretrained(tmp_path / "dense")
    record = lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    assert record.order == "execution"
    architecture = find_architecture(f"hf/{tmp_path}/dense")
    small = lrconvert.load(tmp_path / "small")
    assert trace(small, architecture.inputs).macs == record.macs_after < record.macs_before
    assert_close(
        networks.run(small, tmp_path / "dense"), networks.run(lrconvert.merge(small), tmp_path / "dense"), 1e-5
    )
    assert lrconvert.export(tmp_path / "small", tmp_path / "small.onnx", "onnx").difference < 1e-4


def test_parts_for_other_inputs_are_factorized_too(tmp_path):
    """FLAVA is called with texts; what looks at images is not reached, and what is not called there stays dense."""
    config = transformers.FlavaConfig(
        text_config={**networks.TEXT, **networks.SIZES},
        image_config={**networks.SIZES, "image_size": 32, "patch_size": 8},
        multimodal_config=networks.SIZES,
        hidden_size=64,
        projection_dim=16,
    )
    transformers.FlavaModel(config).save_pretrained(tmp_path / "dense")
    record = lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    assert record.order == "execution"
    assert any("27 weights stand in parts of the network that it does not reach" in note for note in record.notes)
    chosen = {row.name for row in record.layers if row.rank is not None}
    assert "image_model.encoder.layer.1.output.dense" in chosen
    assert record.num_params_after == sum(each.numel() for each in lrconvert.load(tmp_path / "small").parameters())
    never = {row.name for row in record.layers if row.reason == "never called in a forward pass"}
    assert never == {"image_projection", "text_projection", "image_to_mm_projection"}


def test_numbers_that_json_has_not(tmp_path):
    """transformers spells infinities out, in the configuration that a header keeps too."""
    config = transformers.NemotronHConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, hybrid_override_pattern="*"
    )
    assert config.time_step_limit[1] == float("inf")
    config.save_pretrained(tmp_path)
    found = find_architecture(f"hf/{tmp_path}")
    again = find_architecture(found.name, json.loads(json.dumps(found.args)))
    assert type(again.build()) is type(found.build())


def test_code_in_a_folder_is_never_run(tmp_path):
    networks.build("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}, "architectures": ["Evil"]}
    (tmp_path / "evil.py").write_text("raise SystemExit('this ran')")
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    assert lrconvert.analyze(tmp_path).network.architecture is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has no class.*Evil.*never run"):
        find_architecture(f"hf/{tmp_path}")


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match=r"hf/\./nowhere: no such folder"):
        find_architecture("hf/./nowhere")
    with pytest.raises(ModelError, match=r"this folder has no config\.json"):
        find_architecture(f"hf/{tmp_path}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="no such folder, and nothing from the Hugging Face Hub") as error:
        find_architecture("hf/nobody/nothing")
    assert "\n" not in str(error.value)


def test_without_transformers_the_file_alone_is_read(monkeypatch, tmp_path):
    networks.build("bert").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr("lrconvert.models.huggingface.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'lrconvert\[transformers\]'"):
        find_architecture(f"hf/{tmp_path / 'dense'}")
    record = lrconvert.factorize(tmp_path / "dense", "rank_ratio=0.25", output=tmp_path / "small")
    assert (record.model, record.order) == (None, "file")
    monkeypatch.undo()
    # What was written without it loads with it.
    assert type(lrconvert.load(tmp_path / "small")) is transformers.BertForSequenceClassification


def test_on_the_command_line(cli, tmp_path):
    networks.build("gpt2").save_pretrained(tmp_path / "dense")
    result = cli("analyze", tmp_path / "dense", "--json")
    assert result.code == 0, result.err
    assert '"order": "execution"' in result.out
    assert cli("factorize", tmp_path / "dense", "-o", tmp_path / "small", "--rank-ratio", "0.25").code == 0
    assert "hf/GPT2LMHeadModel" in cli("info", tmp_path / "small").out
    assert "pip" not in cli.fails(1, "analyze", tmp_path / "dense", "--model", "hf//nowhere/at/all")


def test_a_real_sentence_encoder(real_checkpoints, tmp_path):
    source = real_checkpoints["minilm"]
    record = lrconvert.factorize(source, "rank_ratio=0.5", output=tmp_path / "small")
    assert (record.model, record.order) == ("hf/BertModel", "execution")
    small = lrconvert.load(tmp_path / "small")
    reference = transformers.AutoModel.from_pretrained(source)
    assert_close(networks.run(lrconvert.load(source), source), networks.run(reference, source), 1e-6)
    out = networks.run(small, source)
    assert torch.equal(out, networks.run(transformers.AutoModel.from_pretrained(tmp_path / "small"), source))
    assert_close(out, networks.run(lrconvert.merge(small), source), 1e-5)
    assert lrconvert.export(tmp_path / "small", tmp_path / "small.onnx", "onnx").difference < 1e-4


def test_parameters_of_bert_as_the_cuttlefish_paper_has_them():
    """BERT-base-cased with two labels; q, k, v and attention's output at rank 345, all else dense."""
    config = transformers.BertConfig(vocab_size=28_996, num_labels=2)
    attention = ["*.attention.self.*", "*.attention.output.dense"]
    model = transformers.BertForSequenceClassification(config)
    plan = lrconvert.make_plan(model, "rank=345", include=attention, keep_first=0, keep_last=False)
    assert len(plan.low_rank) == 48
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 108_311_810
    reshape(model, plan)
    assert sum(parameter.numel() for parameter in model.parameters()) == 108_311_810 - plan.saved_params == 105_436_418

"""The zoo: each network computes what an independent implementation computes, and survives being factorized."""

import copy
import math

import pytest
import torch
from helpers import assert_close, num_params
from torch import nn

import lrconvert
from lrconvert.models import find_architecture
from lrconvert.models.zoo.lstm_lm import LSTMLanguageModel, SingleBiasLSTM
from lrconvert.models.zoo.transformer import DecoderLayer, EncoderLayer, positions


def build(name, **args):
    """A network on the CPU whose parameters are all random: no zeros and ones that hide a mistake."""
    model = find_architecture(f"zoo/{name}", args).build("cpu")
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def test_resnet_is_torchvision_s_with_another_stem():
    import torchvision

    model = build("resnet18_cifar").eval()
    other = torchvision.models.resnet18(num_classes=10)
    other.conv1, other.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    other.load_state_dict({key.replace("shortcut", "downsample"): value for key, value in model.state_dict().items()})
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(model(inputs), other.eval()(inputs))


def test_resnet_without_the_stem_s_norm():
    model = build("resnet18_cifar", width=8, stem_norm=False)
    assert not any(key.startswith("bn1") for key in model.state_dict())
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_vgg_is_torchvision_s_without_biases():
    import torchvision

    model = build("vgg19_bn_cifar", num_linear=1).eval()
    other = torchvision.models.vgg19_bn(weights=None, init_weights=False).eval()
    mine = [module for module in model.features if not isinstance(module, nn.ReLU | nn.MaxPool2d)]
    theirs = [module for module in other.features if not isinstance(module, nn.ReLU | nn.MaxPool2d)]
    for one, two in zip(mine, theirs, strict=True):
        state = one.state_dict()
        if isinstance(one, nn.Conv2d):
            state["bias"] = torch.zeros(one.out_channels)
        two.load_state_dict(state)
    inputs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(model(inputs), model.classifier(other.features(inputs).flatten(1)))


def test_vgg_s_head():
    assert [name for name, _ in build("vgg19_bn_cifar", width=8).classifier.named_parameters() if "weight" in name] == [
        "fc17.weight",
        "fc18.weight",
        "fc19.weight",
    ]
    with pytest.raises(lrconvert.LrconvertError, match="num_linear must be 1 or more"):
        build("vgg19_bn_cifar", num_linear=0)


@pytest.mark.parametrize("name", ["resnet18_cifar", "vgg19_bn_cifar"])
def test_cnns_factorized_from_a_file(tmp_path, name):
    args = {"width": 16, "num_classes": 7}
    torch.save(build(name, **args).state_dict(), tmp_path / "dense.pt")
    record = lrconvert.factorize(
        tmp_path / "dense.pt",
        "rank_ratio=0.25",
        output=tmp_path / "small.safetensors",
        model=f"zoo/{name}",
        model_args=args,
    )
    assert record.order == "execution"
    lrconvert.export(tmp_path / "small.safetensors", tmp_path / "merged.safetensors", "dense")
    small, merged = (lrconvert.load(tmp_path / f"{which}.safetensors") for which in ("small", "merged"))
    inputs = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert_close(small(inputs), merged(inputs))
        small = small.double().train()
        merged = lrconvert.merge(copy.deepcopy(small))
        assert_close(small(inputs.double()), merged(inputs.double()), 1e-10)


# ---- LSTM ----


def plain_lstm(single):
    """nn.LSTM with `single`'s weights, its one bias split over the two."""
    plain = nn.LSTM(single.input_size, single.hidden_size, single.num_layers, bidirectional=single.bidirectional)
    state = dict(single.state_dict())
    for key in [key for key in state if key.startswith("bias_ih")]:
        half = torch.randn_like(state[key])
        state[key], state[key.replace("_ih_", "_hh_")] = state[key] - half, half
    plain.load_state_dict(state)
    return plain


def test_lstm_language_model_of_pufferfish_on_meta():
    model = find_architecture("zoo/lstm_lm").build()
    assert num_params(model) == 85_962_278
    assert (
        sum(value.numel() for value in model.state_dict().values()) == 85_962_278 + 33_278 * 1500
    )  # tied: listed twice
    assert model.decoder.weight is model.encoder.weight
    scores, (h, c) = model(torch.zeros(35, 20, dtype=torch.int64, device="meta"))
    assert scores.shape == (35, 20, 33_278)
    assert h.shape == c.shape == (2, 20, 1500)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_single_bias_lstm_is_nn_lstm(bidirectional):
    single = SingleBiasLSTM(5, 7, 2, bidirectional=bidirectional)
    assert isinstance(single, nn.LSTM)
    assert type(single).forward is nn.LSTM.forward
    assert not any("bias_hh" in key for key in single.state_dict())
    assert num_params(single) == num_params(plain_lstm(single)) - 4 * 7 * 2 * (1 + bidirectional)
    plain = plain_lstm(single)
    inputs = torch.randn(6, 3, 5)
    out, (h, c) = single(inputs)
    want, (want_h, want_c) = plain(inputs)
    for got, wanted in ((out, want), (h, want_h), (c, want_c)):
        assert_close(got.detach(), wanted.detach())
    out.square().sum().backward()
    want.square().sum().backward()
    for key, parameter in single.named_parameters():
        assert_close(parameter.grad, plain.get_parameter(key).grad)


def test_single_bias_lstm_moves_and_copies():
    single = SingleBiasLSTM(5, 7, 2).eval().requires_grad_(False)
    inputs = torch.randn(6, 3, 5)
    want = single(inputs)[0]
    assert_close(copy.deepcopy(single)(inputs)[0], want)
    assert_close(copy.deepcopy(single).double()(inputs.double())[0].float(), want)
    assert_close(copy.deepcopy(single).bfloat16()(inputs.bfloat16())[0].float(), want, 5e-2)
    state = {**dict(single.named_parameters()), **dict(single.named_buffers())}
    assert_close(torch.func.functional_call(SingleBiasLSTM(5, 7, 2), state, (inputs,))[0].detach(), want)
    other = SingleBiasLSTM(5, 7, 2)
    other.load_state_dict(single.state_dict(), strict=True, assign=True)
    assert_close(other(inputs)[0].detach(), want)
    # A step of training changes what it should and leaves the second bias at zero.
    single.train().requires_grad_()(inputs)[0].sum().backward()
    torch.optim.SGD(single.parameters(), 0.1).step()
    assert not any(buffer.any() for buffer in single.buffers())
    assert not torch.allclose(single(inputs)[0], want)


@torch.no_grad()
def test_lstm_language_model_carries_its_state(tmp_path):
    model = LSTMLanguageModel(50, 16, dropout=0.5).eval()
    tokens = torch.randint(50, (12, 3))
    want, (h, c) = model(tokens)
    first, state = model(tokens[:5])
    second, (last_h, last_c) = model(tokens[5:], state)
    assert_close(torch.cat((first, second)), want)
    assert_close(last_h, h)
    assert_close(last_c, c)
    lrconvert.save(
        model, tmp_path / "lm.safetensors", architecture="zoo/lstm_lm", model_args={"vocab_size": 50, "width": 16}
    )
    loaded = lrconvert.load(tmp_path / "lm.safetensors")
    assert loaded.decoder.weight is loaded.encoder.weight
    assert_close(loaded(tokens)[0], want)
    assert not torch.equal(model.train()(tokens)[0], model(tokens)[0])  # dropout


# ---- Transformer ----

SMALL = {"vocab_size": 50, "dim": 32, "num_heads": 4, "hidden": 64, "num_layers": 2}


def copy_attention(mine, theirs):
    """Our four matrices into nn.MultiheadAttention, whose biases become zero."""
    theirs.in_proj_weight.copy_(torch.cat((mine.q.weight, mine.k.weight, mine.v.weight)))
    theirs.out_proj.weight.copy_(mine.o.weight)
    theirs.in_proj_bias.zero_()
    theirs.out_proj.bias.zero_()


def copy_rest(mine, theirs, norms):
    theirs.linear1.load_state_dict(mine.ffn.fc1.state_dict())
    theirs.linear2.load_state_dict(mine.ffn.fc2.state_dict())
    for norm in norms:
        nn.init.uniform_(getattr(mine, norm).weight, 0.5, 1.5)
        nn.init.uniform_(getattr(mine, norm).bias, -1, 1)
        getattr(theirs, norm).load_state_dict(getattr(mine, norm).state_dict())


@torch.no_grad()
def test_transformer_layers_are_torch_s():
    x, memory = torch.randn(3, 6, 32), torch.randn(3, 9, 32)
    seen = torch.ones(3, 9, dtype=torch.bool)
    seen[1, 5:] = False
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    options = {"dropout": 0.0, "layer_norm_eps": 1e-6, "batch_first": True}

    mine, theirs = EncoderLayer(32, 4, 64, 0.0), nn.TransformerEncoderLayer(32, 4, 64, **options)
    copy_attention(mine.attention, theirs.self_attn)
    copy_rest(mine, theirs, ("norm1", "norm2"))
    assert_close(mine(memory, seen[:, None, None])[seen], theirs(memory, src_key_padding_mask=~seen)[seen])

    mine, theirs = DecoderLayer(32, 4, 64, 0.0), nn.TransformerDecoderLayer(32, 4, 64, **options)
    copy_attention(mine.attention, theirs.self_attn)
    copy_attention(mine.cross_attention, theirs.multihead_attn)
    copy_rest(mine, theirs, ("norm1", "norm2", "norm3"))
    want = theirs(x, memory, tgt_mask=~causal, memory_key_padding_mask=~seen)
    assert_close(mine(x, causal, memory, seen[:, None, None]), want)


def test_positions_are_vaswani_s():
    table = positions(50, 32, torch.device("cpu"))
    for place, column in ((0, 0), (0, 1), (7, 4), (49, 31)):
        angle = place / 10_000 ** ((column - column % 2) / 32)
        assert float(table[place, column]) == pytest.approx([math.sin, math.cos][column % 2](angle), abs=1e-5)


@torch.no_grad()
def test_transformer_sees_neither_padding_nor_the_future():
    model = build("transformer", **SMALL).eval()
    source, target = torch.randint(2, 50, (2, 7)), torch.randint(2, 50, (2, 5))
    scores = model(source, target)
    assert scores.shape == (2, 5, 50)
    padded = nn.functional.pad(source, (0, 3), value=1)
    assert_close(model(padded, target), scores)
    later = target.clone()
    later[:, 3:] = 1
    assert_close(model(source, later)[:, :3], scores[:, :3])
    assert not torch.allclose(model(source.flip(1), target), scores)
    assert_close(model.bfloat16()(source, target).float(), scores, 5e-2)


def test_transformer_factorized_from_a_file_stays_tied(tmp_path):
    model = build("transformer", **SMALL).eval()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    record = lrconvert.factorize(
        tmp_path / "dense.pt",
        "rank_ratio=0.25",
        output=tmp_path / "small.safetensors",
        model="zoo/transformer",
        model_args=SMALL,
    )
    assert record.num_params_before == num_params(model)
    small = lrconvert.load(tmp_path / "small.safetensors")
    assert num_params(small) == record.num_params_after
    assert small.output.weight is small.decoder.embedding.weight is small.encoder.embedding.weight
    source, target = torch.randint(2, 50, (2, 7)), torch.randint(2, 50, (2, 5))
    merged = lrconvert.merge(copy.deepcopy(small))
    with torch.no_grad():
        assert_close(small(source, target), merged(source, target))
    small.train()(source, target).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_transformer_s_heads_must_divide_its_width():
    with pytest.raises(lrconvert.LrconvertError, match="divide into 5 heads"):
        build("transformer", num_heads=5)

"""Texts: which lines, which tokens, what is hidden by the mask; and a model that cannot take them."""

import shutil
import subprocess

import pytest
import torch
from helpers import assert_close

from lrconvert.errors import LrconvertError, UsageError
from lrconvert.fidelity import fidelity, outputs_of
from lrconvert.loading import load
from lrconvert.network import open_network
from lrconvert.samples import read_samples

transformers = pytest.importorskip("transformers")

from hf_networks import build  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

# Each word is the letter w and its own token; the five before are special.
SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "<end>": 4}
FIRST = len(SPECIAL)


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def write_tokenizer(folder, framed=True, **settings):
    """A tokenizer of one token a word, with [CLS] before and [SEP] after if `framed`."""
    vocabulary = SPECIAL | {f"w{number}": number for number in range(FIRST, 99)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models of transformers, with 32 positions, in folders with their tokenizers."""
    folder = tmp_path_factory.mktemp("models")
    settings = {
        "bert": {"pad_token": "[PAD]", "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
        "llama": {"pad_token": "[PAD]", "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
        "gpt2": {"framed": False, "eos_token": "<end>"},
        "t5": {"pad_token": "[PAD]"},
    }
    for name, options in settings.items():
        build(name).save_pretrained(folder / name)
        write_tokenizer(folder / name, **options)
    return folder


def line(number):
    """The text that is recognised by its first word: number 0 … 79, and 1 to 40 words long."""
    return " ".join([f"w{FIRST + number}"] + [f"w{FIRST + 90 - FIRST}"] * (number % 40))


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    # With a mark at its start, two kinds of ends, blank lines, and a text that is there twice.
    path.write_bytes("\r\n\n".join(["\ufeff" + line(0), *map(line, range(1, 80)), "  \t", line(7)]).encode())
    return path


def rows(samples):
    """Tokens of every example, without padding."""
    for call in samples.calls:
        ids, mask = call.kwargs["input_ids"], call.kwargs["attention_mask"].bool()
        yield from (row[shown].tolist() for row, shown in zip(ids, mask, strict=True))


def test_lines_become_tokens_and_padding_is_hidden(folders, lines):
    network = open_network(folders / "bert")
    samples = read_samples(str(lines), network, count=100, batch_size=16, max_tokens=20)
    got = sorted(rows(samples), key=lambda row: row[1])
    want = []
    for number in range(80):
        words = [FIRST + number] + [90] * (number % 40)
        want.append([2, *words[:18], 3])
    assert got == want
    assert samples.notes == (
        f"80 texts of {lines}, out of 80: {sum(map(len, want)):,} tokens",
        f"100 examples were asked for, but {lines} has 80",
    )
    for call in samples.calls:
        ids, mask = call.kwargs["input_ids"], call.kwargs["attention_mask"]
        assert set(call.kwargs) == {"input_ids", "token_type_ids", "attention_mask"}
        assert call.size == len(ids) == 16
        # Nothing is longer than the longest text of its own call, and only padding is hidden.
        assert mask.sum(1).max() == ids.shape[1]
        assert not ids[mask == 0].any()


def test_what_a_text_gives_does_not_depend_on_its_batch(folders, lines):
    network, model = open_network(folders / "bert"), load(folders / "bert")
    samples = read_samples(str(lines), network, count=24, batch_size=8)
    for call in samples.calls:
        with torch.no_grad():
            together = call.run(model).logits
            for row, logits in zip(rows_of(call), together, strict=True):
                assert_close(logits, model(input_ids=torch.tensor([row])).logits[0])


def rows_of(call):
    ids, mask = call.kwargs["input_ids"], call.kwargs["attention_mask"].bool()
    return [row[shown].tolist() for row, shown in zip(ids, mask, strict=True)]


def test_texts_of_like_length_share_a_call_and_choices_are_disjoint(folders, lines):
    network = open_network(folders / "bert")
    first, rest = (read_samples(str(lines), network, count=40, batch_size=8, skip=skip) for skip in (0, 40))
    numbers = [[row[1] - FIRST for row in rows(samples)] for samples in (first, rest)]
    assert sorted(numbers[0] + numbers[1]) == list(range(80))
    lengths = [call.kwargs["input_ids"].shape[1] for call in first.calls]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] / 2


def test_texts_are_cut_at_the_models_own_limit(folders, lines):
    network = open_network(folders / "bert")
    samples = read_samples(str(lines), network, count=80, max_tokens=1000)
    assert max(map(len, rows(samples))) == 32
    model = load(folders / "bert")
    with torch.no_grad():
        assert all(call.run(model).logits.isfinite().all() for call in samples.calls)


def test_a_tokenizer_without_padding_pads_with_its_end(folders, lines):
    samples = read_samples(str(lines), open_network(folders / "gpt2"), count=80, batch_size=16, max_tokens=24)
    assert sorted(row[0] for row in rows(samples)) == list(range(FIRST, FIRST + 80))
    hidden = [call.kwargs["input_ids"][call.kwargs["attention_mask"] == 0] for call in samples.calls]
    assert set(torch.cat(hidden).tolist()) == {SPECIAL["<end>"]}


def test_only_what_the_model_takes_is_passed(folders, lines):
    samples = read_samples(str(lines), open_network(folders / "llama"), count=4)
    assert set(samples.calls[0].kwargs) == {"input_ids", "attention_mask"}


def fails(match, data, network, error=LrconvertError, **settings):
    with pytest.raises(error, match=match) as caught:
        read_samples(str(data), network, **settings)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_models_that_cannot_take_texts_say_what_they_take(folders, lines, tmp_path):
    fails("only a folder of transformers has a tokenizer", lines, open_network(torch.nn.Linear(2, 2)), UsageError)
    fails(
        "lines.txt: the model takes .*decoder_input_ids.* and not input_ids",
        lines,
        open_network(folders / "t5"),
        UsageError,
    )
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    fails("is text, but .*vit takes pixel_values", lines, open_network(tmp_path / "vit"), UsageError)
    fails("max_tokens must be at least 1, not 0", lines, open_network(folders / "bert"), UsageError, max_tokens=0)


def test_a_folder_without_its_tokenizer(folders, lines, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    fails("bare has no tokenizer: put the model's tokenizer.json there", lines, open_network(tmp_path / "bare"))
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    fails("bare: transformers cannot load its tokenizer", lines, open_network(tmp_path / "bare"))


def test_a_vocabulary_that_is_too_large_for_the_model(folders, lines, tmp_path):
    shutil.copytree(folders / "bert", tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"w50": 50', '"w50": 99'))
    fails("input_ids holds 99, but the model takes 0 to 98", lines, open_network(tmp_path / "other"), UsageError)


def test_files_that_are_no_texts(folders, tmp_path):
    network = open_network(folders / "bert")
    (tmp_path / "blank.txt").write_text(" \n\n\t\n")
    fails("blank.txt: has 0 examples", tmp_path / "blank.txt", network)
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    fails("picture.jpg: not UTF-8 text .*give a text a line", tmp_path / "picture.jpg", network)


SENTENCE = "the light was good and he divided it from the darkness of night over all waters under heaven"


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """Debian's King James Bible, a verse a line, or sentences of the same words."""
    path = tmp_path_factory.mktemp("texts") / "english.txt"
    bible = shutil.which("bible")
    if bible:
        run = subprocess.run([bible, "-f", "gen1:1-gen8:22"], capture_output=True, text=True, check=False)
        path.write_text("\n".join(" ".join(each.split()[1:]) for each in run.stdout.splitlines() if each.strip()))
    if not bible or not path.read_text().strip():
        words = SENTENCE.split()
        path.write_text("\n".join(" ".join(words[start:] + words[: start // 2]) for start in range(len(words))))
    return path


def test_a_real_model_with_real_texts(real_checkpoints, english):
    folder = real_checkpoints["minilm"]
    samples = read_samples(str(english), open_network(folder), count=12, batch_size=6, max_tokens=40)
    model = load(folder)
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words = {vocabulary[token] for row in rows(samples) for token in row}
    assert {"[CLS]", "[SEP]", "the", "and"} <= words
    assert "[UNK]" not in words
    dense = list(outputs_of(model, samples.calls))
    assert [tuple(output.tensors[0].shape) for output in dense] == [
        (int(call.kwargs["attention_mask"].sum()), 384) for call in samples.calls
    ]
    assert fidelity(outputs_of(model, samples.calls), dense).error == 0
    with torch.no_grad():
        model.get_parameter("encoder.layer.0.output.dense.weight").mul_(0.9)
    assert 0.001 < fidelity(outputs_of(model, samples.calls), dense).error < 0.5

"""The trainer on the command line: runs, their tables and records, recipes, and errors of one line."""

import csv
import io
import json

import pytest
import yaml

SMALL = [
    "model_args={width: 8}",
    "epochs=6",
    "batch_size=128",
    "lr=0.01",
    "low_rank={method: pufferfish, full_rank_epochs: 1}",
]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def trained(cli):
    result = cli("train", "digits/cnn-pufferfish", *SMALL, "-o", "run")
    assert result.code == 0, result.err
    return result


def test_train_shows_epochs_and_a_report_of_80_columns(trained):
    assert "switched to low rank" in trained.out
    assert "E = 1 full-rank epochs" in trained.out
    assert "test accuracy" in trained.out
    assert max(map(len, trained.out.splitlines())) <= 80


def test_the_record_is_json_alone_on_stdout_and_one_row_an_epoch_as_csv(cli):
    result = cli("train", "digits/cnn-pufferfish", *SMALL, "-o", "run", "--json")
    assert json.loads(result.out)["switch_epoch"] == 1
    assert "low-rank" in result.err
    again = cli("train", "digits/cnn-pufferfish", *SMALL, "-o", "run", "--resume", "--csv")
    rows = list(csv.DictReader(io.StringIO(again.out)))
    assert [row["phase"] for row in rows] == ["full-rank"] + ["low-rank"] * 5


def test_what_train_leaves_the_other_commands_take(cli, trained):
    for arguments in (
        ("info", "run/best.safetensors"),
        ("evaluate", "run/best.safetensors", "--dataset", "digits", "batch_size=64"),
        ("export", "run/best.safetensors", "-o", "best.onnx", "--format", "onnx"),
        ("finetune", "run/best.safetensors", "epochs=1", "--dataset", "digits", "-o", "tuned", "-q"),
        ("evaluate", "tuned/best.safetensors", "--dataset", "digits", "--json"),
    ):
        result = cli(*arguments)
        assert result.code == 0, result.err
    assert json.loads(result.out)["accuracy"] > 0.3  # guessing: 0.1


def test_recipes_are_listed_shown_copied_and_checked(cli):
    assert "cifar10/resnet18-cuttlefish" in cli("recipes", "list").out
    shown = yaml.safe_load(cli("recipes", "show", "digits/cnn-sifd", "lr=0.5").out)
    assert (shown["lr"], shown["low_rank"]["method"]) == (0.5, "sifd")
    assert cli("recipes", "copy", "digits/cnn-sifd", "-o", "mine.yaml").code == 0
    assert cli("recipes", "check", "mine.yaml").out.startswith("mine.yaml: good (sifd zoo/digits_cnn on digits")
    taken = cli("recipes", "copy", "digits/cnn-sifd", "-o", "mine.yaml")
    assert (taken.code, taken.err) == (1, "error: mine.yaml exists; choose another output or add --overwrite\n")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("train", "digits/cnn-pufferfish", "epoch=3"), 2, "unknown key 'epoch': did you mean 'epochs'?"),
        (("train", "digits/cnn-puffer"), 2, "did you mean 'digits/cnn-pufferfish'"),
        (("train", "missing.yaml"), 1, "missing.yaml: no such file"),
        (("train", "digits/cnn-dense", "--resume", "-o", "none"), 2, "none holds no run to resume"),
        (("train", "digits/cnn-dense", "dataset=cifar10", "download=false"), 1, "cifar-10-batches-py"),
        (("train", "digits/cnn-dense", "batch_size=4000", "-o", "big"), 2, "batch size 4000 is more than the 1294"),
        (("train", "digits/cnn-dense", "lr=1e30", "opt=sgd", "-o", "nan"), 1, "the loss is not a number any more"),
        (("finetune", "missing.safetensors", "--dataset", "digits"), 1, "missing.safetensors: no such file"),
        (("finetune", "x.safetensors"), 2, "--dataset: name the data"),
        (("evaluate", "missing.safetensors", "--dataset", "digits"), 1, "missing.safetensors: no such file"),
    ],
)
def test_every_mistake_is_one_line(cli, arguments, code, complaint):
    result = cli(*arguments)
    assert result.code == code, result.err
    assert complaint in result.err
    *before, last = result.err.strip().splitlines()
    assert last.startswith("error: ")
    assert complaint in last
    assert not any("Traceback" in line or line.startswith("error") for line in before)

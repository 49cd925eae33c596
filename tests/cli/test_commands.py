"""The command line as a user runs it: every command, its output in every form, and its one-line errors."""

import csv
import io
import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrconvert
from lrconvert.plan import LayerPlan, Plan

STATE = {
    "conv.weight": torch.randn(64, 16, 3, 3),
    "one.weight": torch.randn(64, 64),
    "one.bias": torch.randn(64),
    "two.weight": torch.randn(64, 64),
    "norm.weight": torch.randn(64),
    "head.weight": torch.randn(10, 64),
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    """Run where relative paths are the user's own, at the width of an old terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    torch.save(STATE, "dense.pt")


def test_help_and_version(cli):
    assert "factorize" in cli("--help").out
    assert cli("--version").out.startswith("lrconvert ")
    for command in ("analyze", "factorize", "sweep", "export", "compare", "info", "demo"):
        assert cli(command, "--help").code == 0


def test_as_a_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lrconvert", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_tables_fit_80_columns_and_use_more(cli, monkeypatch):
    runs = [
        ("analyze", "dense.pt"),
        ("factorize", "dense.pt", "-o", "small.safetensors", "--rank-ratio", "0.25"),
        ("info", "small.safetensors"),
        ("compare", "dense.pt", "small.safetensors"),
    ]
    for arguments in runs:
        result = cli(*arguments)
        assert result.code == 0, result.err
        assert max(map(len, result.out.splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "150")
    assert "conv2d?" in cli("analyze", "dense.pt").out
    assert max(map(len, cli("analyze", "dense.pt").out.splitlines())) > 80


def test_analyze_in_every_form(cli):
    text = cli("analyze", "dense.pt").out
    assert "█" in text
    assert "4 weights, 18,176 parameters" in text
    record = json.loads(cli("analyze", "dense.pt", "--json").out)
    assert record["schema_version"] == 1
    assert record["num_params"] == 18176
    rows = {row["name"]: row for row in record["layers"]}
    weight = STATE["one.weight"].double()
    stable = float(weight.norm() ** 2 / torch.linalg.matrix_norm(weight, 2) ** 2)
    assert rows["one"]["stable_rank"] == pytest.approx(stable, rel=1e-6)
    assert rows["one"]["scaled_stable_rank"] == pytest.approx(4 * stable, rel=1e-6)
    table = list(csv.DictReader(io.StringIO(cli("analyze", "dense.pt", "--csv").out)))
    assert [row["name"] for row in table] == ["conv", "one", "two", "head"]
    assert float(table[1]["stable_rank"]) == pytest.approx(stable, rel=1e-6)
    assert cli("analyze", "dense.pt", "-q").out == ""


def test_include_exclude_and_init(cli):
    record = json.loads(cli("analyze", "dense.pt", "-i", "re:one|two", "-e", "two", "--init", "dense.pt", "--json").out)
    (row,) = record["layers"]
    assert row["name"] == "one"
    assert row["xi_source"] == "measured"
    # at initialisation the scaled stable rank is full rank, by definition of ξ
    assert row["scaled_stable_rank"] == pytest.approx(64)
    torch.save({"other.weight": torch.zeros(3, 3)}, "other.pt")
    assert "--init: conv.weight" in cli.fails(2, "analyze", "dense.pt", "--init", "other.pt")


def test_the_main_job(cli):
    result = cli("factorize", "dense.pt", "-o", "small.safetensors", "--rank-ratio", "0.25", "--json")
    record = json.loads(result.out)
    assert result.err == ""
    assert record["num_params_before"] == 18176
    # two 64×64 matrices at rank 16; the first layer and the last classifier stay dense
    assert record["num_params_after"] == 18176 - 2 * (64 * 64 - 16 * 128)
    assert {row["name"]: row["rank"] for row in record["layers"]} == {"conv": None, "one": 16, "two": 16, "head": None}
    tensors = load_file("small.safetensors")
    assert set(tensors) == {
        "conv.weight",
        "one.u.weight",
        "one.v.weight",
        "one.v.bias",
        "two.u.weight",
        "two.v.weight",
        "norm.weight",
        "head.weight",
    }
    assert torch.equal(tensors["norm.weight"], STATE["norm.weight"])

    info = json.loads(cli("info", "small.safetensors", "--json").out)
    assert info["num_params"] == record["num_params_after"]
    assert info["rule"] == "rank_ratio=0.25"
    assert info["dense"] == {"first layer": 1, "last classifier": 1}

    assert cli("export", "small.safetensors", "-o", "dense.safetensors", "--format", "dense").code == 0
    differences = json.loads(cli("compare", "small.safetensors", "dense.safetensors", "--json").out)
    assert all(row["difference"] < 1e-6 for row in differences["layers"])
    assert len(differences["layers"]) == 4
    errors = {row["name"]: row["error"] for row in record["layers"] if row["rank"]}
    versus = json.loads(cli("compare", "dense.pt", "small.safetensors", "--json").out)
    found = {row["name"]: row["difference"] for row in versus["layers"] if row["rank"][1]}
    assert found == pytest.approx(errors, abs=1e-5)


def test_auto_keeps_dense_what_would_not_shrink(cli):
    line = cli.fails(3, "factorize", "dense.pt", "-o", "small.pt", "--auto")
    assert "would not shrink: rank" in line


def test_plans_are_saved_edited_and_run_again(cli, tmp_path):
    result = cli("factorize", "dense.pt", "--energy", "0.5", "--dry-run", "--save-plan", "plan.json")
    assert "dry run: nothing is written" in result.out
    plan = json.loads((tmp_path / "plan.json").read_text())
    for layer in plan["layers"]:
        if layer["name"] == "one":
            layer["rank"] = 5
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    record = json.loads(cli("factorize", "dense.pt", "-o", "small.pt", "--plan", "plan.json", "--json").out)
    assert next(row["rank"] for row in record["layers"] if row["name"] == "one") == 5
    assert torch.load("small.pt", weights_only=True)["state_dict"]["one.u.weight"].shape == (5, 64)
    assert "--include would change nothing" in cli.fails(
        2, "factorize", "dense.pt", "-o", "x.pt", "--plan", "plan.json", "-i", "one"
    )
    assert "plan.json exists" in cli.fails(
        1, "factorize", "dense.pt", "-o", "x.pt", "--rank", "3", "--save-plan", "plan.json"
    )


def test_layer_rank_multiple_floor_and_ends(cli):
    record = json.loads(
        cli(
            *("factorize", "dense.pt", "--dry-run", "--json", "--rank", "3", "--rank-multiple", "4", "--rank-floor"),
            *("0.2", "--layer-rank", "two=7", "--keep-first", "0", "--factorize-last"),
        ).out
    )
    ranks = {row["name"]: row["rank"] for row in record["layers"]}
    # floor: 0.2 · 64 = 12.8, rounded to 13, then up to a multiple of 4; of 10 it is 2, so 3 and then 4
    assert ranks == {"conv": 16, "one": 16, "two": 7, "head": 4}


def test_export_to_graphs_from_a_python_file(cli, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\ninput_shape = (16,)\n"
        "def build(width=32):\n"
        "    return torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 32))\n"
    )
    net = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.ReLU(), torch.nn.Linear(48, 32))
    torch.save(net.state_dict(), "net.pt")
    named = ("--model", "net.py:build", "--model-arg", "width=48")
    assert (
        cli(
            "factorize", "net.pt", "-o", "s.safetensors", "--rank", "8", "--keep-first", "0", "--factorize-last", *named
        ).code
        == 0
    )
    # a header never makes a Python file run
    assert "only run when you ask" in cli.fails(1, "export", "s.safetensors", "-o", "net.onnx", "-f", "onnx")
    for format in ("onnx", "pt2"):
        record = json.loads(cli("export", "s.safetensors", "-o", f"net.{format}", "-f", format, *named, "--json").out)
        assert record["difference"] < 1e-5
    assert "net.onnx exists" in cli.fails(1, "export", "s.safetensors", "-o", "net.onnx", "-f", "onnx", *named)
    assert "differ from the model's by" in cli.fails(
        4, "export", "s.safetensors", "-o", "x.onnx", "-f", "onnx", *named, "--tolerance", "0"
    )
    assert not (tmp_path / "x.onnx").exists()


def test_one_line_errors(cli, tmp_path):
    torch.save({**STATE, "two.weight": torch.full((64, 64), float("nan"))}, "nan.pt")
    save_file(STATE, "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    (tmp_path / "half.pt").write_bytes((tmp_path / "dense.pt").read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    small = ("-o", "small.pt", "--rank", "4")
    cases = [
        (1, ("analyze", "none.pt"), "no such file"),
        (1, ("analyze", "empty.pt"), "the file is empty"),
        (1, ("analyze", "half.safetensors"), "not a whole safetensors file"),
        (1, ("analyze", "half.pt"), "the end of the file is missing"),
        (1, ("analyze", "nan.pt"), "two: 4096 of 4096 values are NaN or infinite"),
        (1, ("factorize", "nan.pt", *small), "two: 4096 of 4096 values are NaN or infinite"),
        (1, ("factorize", "dense.pt", "-o", "whole.safetensors", "--rank", "4"), "exists; choose another output"),
        (1, ("factorize", "dense.pt", "-o", "none/small.pt", "--rank", "4"), "no such folder"),
        (2, ("factorize", "dense.pt", "-o", "small.xyz", "--rank", "4"), "end the output in"),
        (2, ("factorize", "dense.pt", "--rank", "4"), "say where to write"),
        (2, ("factorize", "dense.pt", "-o", "small.pt"), "say how to choose the ranks"),
        (2, ("factorize", "dense.pt", *small, "--auto"), "one rank rule at a time"),
        (2, ("factorize", "dense.pt", "-o", "small.pt", "--rule", "stabel_rank"), "did you mean 'stable_rank'"),
        (2, ("factorize", "dense.pt", *small, "-i", "layer9*"), "matches no layer"),
        (2, ("factorize", "dense.pt", *small, "--model", "torchvision/resnet81"), "did you mean 'resnet18'"),
        (1, ("factorize", "dense.pt", *small, "--model", "torchvision/alexnet"), "does not match torchvision/alexnet"),
        (2, ("factorize", "dense.pt", *small, "--model-arg", "width"), "write KEY=VALUE"),
        (2, ("factorize", "dense.pt", *small, "--input-shape", "a,b"), "write positive numbers"),
        (2, ("factorize", "dense.pt", *small, "--layer-rank", "one"), "write PATTERN=NUMBER"),
        (2, ("factorize", "dense.pt", *small, "--device", "tpu9"), "unknown device 'tpu9'"),
        (3, ("factorize", "dense.pt", *small, "--keep-first", "99"), "no layer to factorize"),
        (1, ("export", "dense.pt", "-o", "x.onnx", "-f", "onnx"), "names no architecture"),
        (2, ("export", "dense.pt", "-o", "x.onnx", "-f", "onyx"), "did you mean 'onnx'"),
        (2, ("export", "dense.pt", "-o", "x.pt", "-f", "safetensors"), "end the output in .safetensors"),
        (2, ("analyze", "dense.pt", "--json", "--csv"), "choose one"),
        (2, ("analyze",), "Missing argument"),
        (2, ("analyze", "dense.pt", "--josn"), "--json"),
        (2, ("frobnicate",), "No such command"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for code, arguments, message in cases:
        assert message in cli.fails(code, *arguments), arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_factorized_file_is_not_factorized_again(cli):
    cli("factorize", "dense.pt", "-o", "small.pt", "--rank", "4")
    line = cli.fails(1, "factorize", "small.pt", "-o", "smaller.pt", "--rank", "2")
    assert "is factorized already" in line
    assert "--format dense" in line


def test_an_all_zero_layer_and_a_one_by_one_matrix(cli):
    torch.save({**STATE, "two.weight": torch.zeros(64, 64), "tiny.weight": torch.ones(1, 1)}, "odd.pt")
    assert cli("analyze", "odd.pt").code == 0
    record = json.loads(cli("factorize", "odd.pt", "-o", "small.pt", "--rank", "4", "--json", "--factorize-last").out)
    reasons = {row["name"]: row["reason"] for row in record["layers"]}
    assert reasons["two"] == "all zero"
    assert reasons["tiny"] == "would not shrink: rank 1, break-even 0"
    torch.save({"tiny.weight": torch.ones(1, 1)}, "tiny.pt")
    assert "would not shrink" in cli.fails(3, "factorize", "tiny.pt", "-o", "t.pt", "--rank", "1")


def test_an_interrupt_exits_with_130_and_leaves_nothing(tmp_path):
    names = [f"layer{number}" for number in range(30)]
    save_file({f"{name}.weight": torch.randn(1200, 1200) for name in names}, "large.safetensors")
    layers = [
        LayerPlan(name=name, weight=f"{name}.weight", kind="linear", shape=(1200, 1200), rank=9) for name in names
    ]
    lrconvert.save_plan(Plan(layers=tuple(layers)), tmp_path / "plan.json")
    arguments = ["factorize", "large.safetensors", "-o", "out.safetensors", "--plan", "plan.json"]
    child = subprocess.Popen(
        [sys.executable, "-m", "lrconvert", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it runs in the background with interrupts ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.safetensors.*")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert err.strip().splitlines()[-1] == "error: interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.pt", "large.safetensors", "plan.json"]

"""The shape of the project: imports run one way, --help stays light, and one error has one exit code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lrconvert

PACKAGE = Path(lrconvert.__file__).parent

# Rooms from the ground up: a room may import its own floor and those below it.
FLOORS = [
    {"errors", "noise", "allocation", "heads", "timer"},
    {"recipe", "recipes"},
    {
        "calling",
        "hardware",
        "images",
        "inputs",
        "layers",
        "modes",
        "moments",
        "outputs",
        "parallel",
        "patterns",
        "tensors",
    },
    {"spectrum", "stable_rank"},
    {"ranks", "cost", "budget", "fidelity", "products", "response"},
    {"plan", "plan_budget", "plan_check", "rewrite", "views"},
    {
        "bench",
        "calibration",
        "factorization",
        "latency",
        "onnx_graph",
        "profiling",
        "sensitivity",
        "sequential",
        "single_layers",
        "speed",
        "surgery",
    },
    {"checkpoints", "models"},
    {"fit", "hf"},
    {"network"},
    {"analysis", "exporters", "loading", "planning", "report"},
    {"training"},
    {"samples"},
    {"api"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path):
    parts = path.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lrconvert":
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lrconvert."))


FILES = [path for path in PACKAGE.rglob("*.py") if room_of(path) not in ("__init__", "__main__")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_up(path):
    for imported in imports_of(path):
        if imported in FLOOR:
            assert FLOOR[imported] <= FLOOR[room_of(path)], f"{path} imports {imported}, which is above it"
        else:
            assert imported == "__version__", f"{imported} has no floor: add it to FLOORS"


def test_help_does_not_import_torch():
    program = (
        "import sys; from lrconvert.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'torchvision', 'onnx', 'onnxruntime', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "analyze" in done.stdout


def test_every_public_name_can_be_imported_and_is_documented():
    for name in lrconvert.__all__:
        assert getattr(lrconvert, name).__doc__
    assert set(lrconvert.__all__) <= set(dir(lrconvert))
    with pytest.raises(AttributeError, match="no attribute 'anlyze'"):
        lrconvert.anlyze  # noqa: B018

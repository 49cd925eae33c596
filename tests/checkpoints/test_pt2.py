"""torch.export archives as input: their weights are the model's, read lazily, and nothing in them runs."""

import io
import json
import os
import zipfile

import pytest
import torch
from helpers import assert_close

import lrconvert
from lrconvert.checkpoints import Header, open_checkpoint
from lrconvert.checkpoints.pt2_file import _DTYPES
from lrconvert.errors import CheckpointError, UnsafeCheckpointError

# torch says so itself of views that were saved without the tensor they are views of.
pytestmark = pytest.mark.filterwarnings("ignore:No complete tensor found")


class Net(torch.nn.Module):
    """Tied weights, a transposed parameter, a view, bfloat16, a constant and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(32, 32)
        self.tied = torch.nn.Linear(32, 32, bias=False)
        self.tied.weight = self.first.weight
        self.conv = torch.nn.Conv2d(3, 8, 3).to(torch.bfloat16)
        self.transposed = torch.nn.Parameter(torch.randn(6, 4).T)
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))
        self.register_buffer("rows", self.table[1:])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("unsaved", torch.ones(3), persistent=False)
        self.constant = torch.ones(2)

    def forward(self, x):
        buffers = (self.transposed, self.table, self.rows, self.empty, self.count, self.unsaved, self.constant)
        conv = self.conv(torch.zeros(1, 3, 5, 5, dtype=torch.bfloat16)).float()
        return self.tied(self.first(x)) + conv.sum() + sum(each.sum() for each in buffers)


@pytest.fixture
def archive(tmp_path):
    """(path, state dict) of an exported network."""
    model = Net().eval()
    torch.export.save(torch.export.export(model, (torch.zeros(2, 32),)), tmp_path / "net.pt2")
    return tmp_path / "net.pt2", model.state_dict()


def rewrite(path, change):
    """Rewrite every record of a zip file: `change` takes (name, data) and returns the new pair, or None."""
    with zipfile.ZipFile(path) as old:
        records = [change(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, "w") as new:
        for record in records:
            if record is not None:
                new.writestr(*record)


def config_of(path):
    with zipfile.ZipFile(path) as archive:
        return next(name for name in archive.namelist() if name.endswith("weights_config.json"))


def change_config(path, change):
    config = config_of(path)

    def edit(name, data):
        if name != config:
            return name, data
        entries = json.loads(data)
        change(entries["config"])
        return name, json.dumps(entries)

    rewrite(path, edit)


def test_the_weights_of_an_archive_are_the_models(archive):
    path, state = archive
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == "pt2"
    assert set(checkpoint.tensors) == set(state)
    for key, tensor in state.items():
        ref = checkpoint.tensors[key]
        assert (ref.shape, ref.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(ref.read(), tensor)
        assert ref.read().is_contiguous()
    assert checkpoint.tensors["tied.weight"].alias_of == "first.weight"
    assert any("its graph is not rewritten" in note for note in checkpoint.notes)


def test_the_numbers_of_dtypes_are_torchs():
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE

    assert {int(number): dtype for number, dtype in _SERIALIZE_TO_TORCH_DTYPE.items()} == _DTYPES


def test_nothing_is_unpickled_and_no_graph_is_built(archive, monkeypatch):
    path, _ = archive
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(torch.export, "load", None)
    for ref in open_checkpoint(path).tensors.values():
        ref.read()


def test_archives_of_older_torch_are_read_whole(archive, tmp_path):
    _, state = archive
    nested = io.BytesIO()
    torch.save(dict(state), nested)
    for name in ("m/data/weights/model.pt", "serialized_state_dict.pt"):
        with zipfile.ZipFile(tmp_path / "old.pt2", "w") as file:
            file.writestr("m/archive_format", "pt2")
            file.writestr(name, nested.getvalue())
        checkpoint = open_checkpoint(tmp_path / "old.pt2")
        assert all(torch.equal(checkpoint.tensors[key].read(), tensor) for key, tensor in state.items())
        assert any("read whole" in note for note in checkpoint.notes)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_archive_that_would_run_code_is_refused(tmp_path):
    nested = io.BytesIO()
    torch.save({"w": torch.ones(2, 2), "x": Runs(tmp_path / "ran")}, nested)
    with zipfile.ZipFile(tmp_path / "bad.pt2", "w") as file:
        file.writestr("serialized_state_dict.pt", nested.getvalue())
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir"):
        open_checkpoint(tmp_path / "bad.pt2")
    assert not (tmp_path / "ran").exists()


def test_layouts_that_cannot_be_read_are_one_line_with_the_fix(archive, tmp_path):
    path, _ = archive
    whole = path.read_bytes()

    def refused(match):
        with pytest.raises(CheckpointError, match=match) as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)
        path.write_bytes(whole)

    config = config_of(path)
    rewrite(path, lambda name, data: None if name == config else (name, data))
    refused(r"a layout that lrconvert does not know.*torch\.save")
    rewrite(path, lambda name, data: None if name == config else (name.replace("/models/", "/aotinductor/"), data))
    refused("a compiled AOTInductor package")
    change_config(path, lambda entries: entries["table"].update(use_pickle=True))
    refused("'table' is not a plain tensor")
    change_config(path, lambda entries: entries["table"]["tensor_meta"].update(dtype=999))
    refused("'table' is not a plain tensor")
    change_config(path, lambda entries: entries["table"]["tensor_meta"].update(sizes=[{"as_expr": {"expr_str": "s0"}}]))
    refused("'table' is not a plain tensor")
    change_config(path, lambda entries: entries["table"]["tensor_meta"].update(storage_offset={"as_int": -4}))
    refused("'table' is not a plain tensor")
    change_config(path, lambda entries: entries["table"]["tensor_meta"].update(storage_offset={"as_int": 1}))
    refused("the record of 'table' is shorter than its tensor")
    change_config(path, lambda entries: entries["table"].update(path_name="weight_99"))
    refused("'table' is not a plain tensor")
    rewrite(path, lambda name, data: (name, "{" if name == config else data))
    refused("cannot be understood")
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in records.items():
            new.writestr(name, data)
    refused("is compressed; write it again with torch.export.save")
    path.write_bytes(whole[: len(whole) // 2])
    refused("the end of the file is missing")


def test_several_models_are_chosen_from(archive, cli):
    path, state = archive
    config = config_of(path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(config.replace("model_weights", "other_weights"), file.read(config))
    assert "holds several models (model, other); choose one with --checkpoint-key" in cli.fails(2, "info", path)
    assert "no model 'third' in it; known: model, other" in cli.fails(2, "info", path, "--checkpoint-key", "third")
    assert json.loads(cli("info", path, "--json", "--checkpoint-key", "other").out)["num_tensors"] == len(state)


def test_an_archive_is_analyzed_and_factorized_into_a_checkpoint(archive, tmp_path, cli):
    path, state = archive
    assert json.loads(cli("info", path, "--json").out)["format"] == "pt2"
    rows = {row["name"]: row for row in json.loads(cli("analyze", path, "--json").out)["layers"]}
    weight = state["conv.weight"].reshape(8, -1).double()
    assert rows["conv"]["sigma_max"] == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-5)
    arguments = ("--layer-rank", "conv=3", "--rank", "3", "--keep-first", "0", "--factorize-last")
    line = cli.fails(2, "factorize", path, "-o", tmp_path / "small.pt2", *arguments)
    assert "a graph is not rewritten: write small.safetensors" in line
    assert "lrconvert export --format pt2" in line
    for name in ("small.safetensors", "small.pt"):
        result = cli("factorize", path, "-o", tmp_path / name, *arguments)
        assert result.code == 0, result.err
        tensors = open_checkpoint(tmp_path / name).tensors
        assert tensors["conv.u.weight"].shape == (3, 3, 3, 3)
        assert tensors["conv.u.weight"].dtype == torch.bfloat16
        assert torch.equal(tensors["transposed"].read(), state["transposed"])


def test_our_own_archives_say_what_is_in_them(tmp_path, small_model):
    torch.save(small_model.eval().state_dict(), tmp_path / "dense.pt")
    (tmp_path / "net.py").write_text(
        "import torch\ninput_shape = (3, 8, 8)\n"
        "def build():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.BatchNorm2d(32),\n"
        "        torch.nn.ReLU(), torch.nn.Conv2d(32, 48, 3, stride=2, padding=1), torch.nn.Flatten(),\n"
        "        torch.nn.Linear(48 * 16, 64), torch.nn.Linear(64, 10))\n"
    )
    model = f"{tmp_path / 'net.py'}:build"
    small, graph = tmp_path / "small.safetensors", tmp_path / "small.pt2"
    lrconvert.factorize(tmp_path / "dense.pt", "rank_ratio=0.25", output=small, model=model)
    lrconvert.export(small, graph, "pt2", model=model)
    checkpoint = open_checkpoint(graph)
    assert isinstance(checkpoint.header, Header)
    assert checkpoint.header.plan == open_checkpoint(small).header.plan
    inputs = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        want = torch.export.load(graph).module()(inputs)
        assert_close(lrconvert.load(graph, model)(inputs), want)

"""What training scripts save around the weights: unwrapped, said, and never opened."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import random
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lrconvert
from lrconvert.checkpoints import open_checkpoint
from lrconvert.checkpoints.prefix import fitted
from lrconvert.errors import CheckpointError, UnsafeCheckpointError, UsageError


def network():
    return torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 32))


def trained():
    """(model, optimizer) after one step, so that the optimizer has tensors of the weights' shapes."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    return model, optimizer


def same(checkpoint, state):
    assert set(checkpoint.tensors) == set(state)
    assert all(torch.equal(checkpoint.tensors[key].read(), tensor) for key, tensor in state.items())


class Config:
    """Stands for a class of the training program's own."""

    def __init__(self):
        self.width = 3


class Settings(dict):
    """As OmegaConf's and Lightning's containers: filled item by item."""


class Names(list):
    """A list of its own class."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "net", "module", "params", "params_ema", "anything"]
)
def test_the_optimizer_is_left_behind(tmp_path, key, legacy):
    model, optimizer = trained()
    content = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        key: model.state_dict(),
        "rng_state": torch.get_rng_state(),
    }
    if key == "anything":
        del content["rng_state"]
    torch.save(content, tmp_path / "last.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "last.pt")
    same(checkpoint, model.state_dict())
    assert any(f"read from '{key}'; left behind: epoch, optimizer" in note for note in checkpoint.notes)


def timm_checkpoint(path):
    """What timm's CheckpointSaver writes; returns (weights, averaged weights)."""
    model, optimizer = trained()
    averaged = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    args = argparse.Namespace(model="resnet50", output=pathlib.PurePosixPath("out"), lr=0.1, config=Config())
    content = {
        "epoch": 7,
        "arch": "resnet50",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": args,
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": averaged,
        "metric": np.float64(76.1),
    }
    torch.save(content, path)
    return model.state_dict(), averaged


def test_timm_checkpoints(tmp_path, cli):
    path = tmp_path / "model_best.pth.tar"
    weights, averaged = timm_checkpoint(path)
    checkpoint = open_checkpoint(path)
    same(checkpoint, averaged)
    first, *others = checkpoint.notes
    assert first.startswith(
        "read from 'state_dict_ema', the averaged weights (--checkpoint-key state_dict reads the others)"
    )
    assert "args (argparse.Namespace, not opened)" in first
    assert any(note.startswith("not opened, since that would run code: ") for note in others)
    same(open_checkpoint(path, "state_dict"), weights)
    with pytest.raises(UsageError, match="no state dict under 'modle'; known: state_dict, state_dict_ema"):
        open_checkpoint(path, "modle")
    for command in (("info",), ("analyze",), ("factorize", "--rank", "2", "--keep-first", "0", "--dry-run")):
        assert "no state dict under 'x'" in cli.fails(2, *command, path, "--checkpoint-key", "x")
        record = json.loads(cli(*command, path, "--checkpoint-key", "state_dict", "--json").out)
        assert record["notes"][0] == "read from 'state_dict'"
    out = tmp_path / "dense.safetensors"
    assert cli("export", path, "-o", out, "-f", "dense", "--checkpoint-key", "state_dict").code == 0
    same(open_checkpoint(out), weights)


def test_an_average_of_the_parameters_alone_is_no_network(tmp_path):
    model = network()
    torch.save({"model": model.state_dict(), "ema": dict(model.named_parameters())}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    same(checkpoint, model.state_dict())
    assert "(there is 'ema' too and is incomplete: --checkpoint-key ema reads it)" in checkpoint.notes[0]


def test_torchs_own_averaged_model(tmp_path):
    model = network()
    torch.save(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)).state_dict(), tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    same(checkpoint, model.state_dict())
    assert "prefix 'module.' removed from every key; left behind: n_averaged" in checkpoint.notes


def lightning_content(model, **more):
    return {
        "epoch": 1,
        "global_step": 100,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {f"model.{key}": value for key, value in model.state_dict().items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {
            "ModelCheckpoint": {"best_model_score": torch.tensor(0.3), "dirpath": pathlib.PurePosixPath("x")}
        },
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": Settings(width=3, names=Names(["a", "b"]), counts=collections.defaultdict(int, a=1)),
        **more,
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_lightning_checkpoints(tmp_path, legacy):
    model = network()
    torch.save(lightning_content(model), tmp_path / "l.ckpt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "l.ckpt")
    same(checkpoint, model.state_dict())
    assert "prefix 'model.' removed from every key" in checkpoint.notes
    assert "left behind: epoch, global_step, pytorch-lightning_version" in checkpoint.notes[0]


def test_a_model_settles_what_lightning_wrapped(tmp_path):
    model = network()
    content = lightning_content(model)
    content["state_dict"]["criterion.weight"] = torch.ones(3)
    torch.save(content, tmp_path / "l.ckpt")
    assert "model.0.weight" in open_checkpoint(tmp_path / "l.ckpt").tensors
    target = network()
    lrconvert.load(tmp_path / "l.ckpt", target)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in target.state_dict().items())
    found = fitted(open_checkpoint(tmp_path / "l.ckpt"), network().state_dict())
    assert found.notes[-1] == (
        "prefix 'model.' removed, as the model has no such part; 1 keys without it left behind: criterion.weight"
    )


class Holder(torch.nn.Module):
    """A model whose own attribute is called `module`."""

    def __init__(self):
        super().__init__()
        self.module = network()

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_attribute_called_module_is_the_models_own(tmp_path, wrapped, cli):
    model = Holder()
    state = {("module." if wrapped else "") + key: value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    target = Holder()
    lrconvert.load(tmp_path / "m.pt", target)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in target.state_dict().items())
    (tmp_path / "holder.py").write_text(
        "import torch\nclass Holder(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.module = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.BatchNorm1d(32),"
        " torch.nn.Linear(32, 32))\n    def forward(self, x):\n        return self.module(x)\n"
    )
    named = ("--model", f"{tmp_path / 'holder.py'}:Holder", "--input-shape", "32")
    out = tmp_path / "small.safetensors"
    result = cli("factorize", tmp_path / "m.pt", "-o", out, *named, "--rank", "2", "--keep-first", "0", "--json")
    assert result.code == 0, result.err
    assert "prefix 'module.' put before every key, as the model has it" in json.loads(result.out)["notes"]
    assert "module.0.u.weight" in open_checkpoint(out).tensors
    # and what lrconvert wrote is read by the names in its plan
    assert open_checkpoint(out).header.plan.low_rank[0].name == "module.0"
    lrconvert.load(out, Holder())


@pytest.mark.parametrize("save", [torch.save, save_file])
@pytest.mark.parametrize(
    ("before", "note"),
    [
        ("_orig_mod.{}", "prefix '_orig_mod.' removed from every key"),
        ("module.{}", "prefix 'module.' removed from every key"),
        ("module._orig_mod.{}", "prefix 'module.' removed from every key"),
        ("_orig_mod.module.{}", "prefix 'module.' removed from every key"),
    ],
)
def test_prefixes_in_every_format(tmp_path, save, before, note):
    path = tmp_path / ("m.pt" if save is torch.save else "m.safetensors")
    state = network().state_dict()
    save({before.format(key): value for key, value in state.items()}, path)
    checkpoint = open_checkpoint(path)
    same(checkpoint, state)
    assert note in checkpoint.notes
    assert set(checkpoint.files[path]) == set(state)


def test_compiled_and_sharded_parts_are_found_at_any_depth(tmp_path):
    state = {
        "blocks.0._orig_mod.fc.weight": torch.ones(2, 2),
        "blocks.1._fsdp_wrapped_module.fc.weight": torch.ones(2, 2),
    }
    save_file({**state, "my_orig_mod.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert set(checkpoint.tensors) == {"blocks.0.fc.weight", "blocks.1.fc.weight", "my_orig_mod.weight"}
    assert "'_orig_mod.' removed from 1 keys" in checkpoint.notes


def test_module_stays_where_one_key_has_it_not(tmp_path):
    state = {"module.weight": torch.ones(2, 2), "head.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "m.pt")
    same(open_checkpoint(tmp_path / "m.pt"), state)


def test_tied_weights_stay_tied_under_their_new_names(tmp_path):
    weight = torch.randn(4, 3)
    torch.save({"module.a.weight": weight, "module.b.weight": weight}, tmp_path / "m.pt")
    assert open_checkpoint(tmp_path / "m.pt").tensors["b.weight"].alias_of == "a.weight"


def test_several_networks_are_the_users_choice(tmp_path):
    model, optimizer = trained()
    content = {"student": model.state_dict(), "teacher": network().state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(
        CheckpointError, match=r"several state dicts \(student, teacher\); choose with --checkpoint-key"
    ):
        open_checkpoint(tmp_path / "m.pt")
    same(open_checkpoint(tmp_path / "m.pt", "student"), model.state_dict())
    torch.save({"models": {"a.b": {"g": model.state_dict()}}}, tmp_path / "m.pt")
    same(open_checkpoint(tmp_path / "m.pt", "models.a.b.g"), model.state_dict())
    with pytest.raises(UsageError, match=r"no state dict under 'models\.a\.c'"):
        open_checkpoint(tmp_path / "m.pt", "models.a.c")


def test_a_key_where_nothing_is_wrapped(tmp_path):
    torch.save(network().state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="no state dict under 'ema'; known: none, it is not wrapped"):
        open_checkpoint(tmp_path / "m.pt", "ema")
    save_file(network().state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=r"files of torch\.save, and this is none"):
        open_checkpoint(tmp_path / "m.safetensors", "ema")
    (tmp_path / "m.pt").unlink()
    with pytest.raises(UsageError, match="chooses within one torch file: name it"):
        open_checkpoint(tmp_path, "ema")


def test_another_network_keeps_its_names(tmp_path):
    torch.save({"backbone.0.weight": torch.ones(3, 3), "head.weight": torch.ones(3, 3)}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert fitted(checkpoint, network().state_dict()) is checkpoint


class Runs:
    """Calls a function with the path when it is unpickled carelessly."""

    def __init__(self, function, path):
        self.function, self.path = function, path

    def __reduce__(self):
        return self.function, (str(self.path),)


def leave_mark(path):
    """What a hostile file would have run; it leaves a mark."""
    pathlib.Path(path).mkdir()


@pytest.mark.parametrize("legacy", [False, True])
def test_code_beside_the_weights_is_neither_run_nor_in_the_way(tmp_path, legacy):
    mark, model = tmp_path / "ran", network()
    content = {"model": model.state_dict(), "logger": Runs(leave_mark, mark)}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    same(checkpoint, model.state_dict())
    assert any(
        f"not opened, since that would run code: {leave_mark.__module__}.leave_mark" in n for n in checkpoint.notes
    )
    assert not mark.exists()


@pytest.mark.parametrize("function", [eval, exec, os.system, __import__])
def test_files_that_no_training_script_writes_are_refused(tmp_path, function):
    torch.save({"model": network().state_dict(), "x": Runs(function, "1")}, tmp_path / "m.pt")
    with pytest.raises(
        UnsafeCheckpointError, match=f"a pickled '.*{function.__name__}', and reading that would run code"
    ):
        open_checkpoint(tmp_path / "m.pt")


def test_weights_inside_an_object_are_refused_with_its_name(tmp_path):
    model, optimizer = trained()
    for content in (
        {"model": model, "optimizer": optimizer.state_dict(), "ema": None},
        {"model": model, "criterion": {"weight": torch.ones(3)}},
        {"weight": torch.ones(2, 2), "other": Config()},
        Config(),
    ):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(
            UnsafeCheckpointError, match=r"holds a pickled '.*(Sequential|Config)'.*torch\.save\(model\.state"
        ):
            open_checkpoint(tmp_path / "m.pt")


def test_python_and_numpy_random_states(tmp_path):
    model = network()
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    torch.save({"model": model.state_dict(), "rng": states}, tmp_path / "m.pt")
    same(open_checkpoint(tmp_path / "m.pt"), model.state_dict())


def test_reading_leaves_torchs_own_settings_as_they_were(tmp_path):
    timm_checkpoint(tmp_path / "m.pt")
    before = set(torch.serialization.get_safe_globals())
    open_checkpoint(tmp_path / "m.pt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "m.pt", weights_only=True)


def test_a_mapping_of_another_class_is_a_state_dict_too(tmp_path):
    state = Settings(network().state_dict())
    torch.save({"state_dict": state, "x": types.SimpleNamespace(a=1)}, tmp_path / "m.pt")
    same(open_checkpoint(tmp_path / "m.pt"), state)

"""Reading: every format gives the same tensors, lazily, and nothing that is read runs code."""

import json
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from lrconvert.checkpoints import Header, open_checkpoint
from lrconvert.checkpoints.safetensors_file import DTYPES
from lrconvert.errors import CheckpointError, UnsafeCheckpointError

STATE = OrderedDict(
    {
        "fc.weight": torch.randn(6, 4),
        "fc.bias": torch.randn(6),
        "half": torch.randn(3).half(),
        "counter": torch.tensor(5),
        "empty": torch.empty(0, 2),
    }
)


def same(checkpoint, state):
    assert set(checkpoint.tensors) == set(state)
    for key, tensor in state.items():
        ref = checkpoint.tensors[key]
        assert (ref.shape, ref.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(ref.read(), tensor)


def write_shards(folder, suffix):
    keys = list(STATE)
    parts = {f"part-1{suffix}": keys[:2], f"part-2{suffix}": keys[2:]}
    for name, some in parts.items():
        (save_file if suffix == ".safetensors" else torch.save)({key: STATE[key] for key in some}, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, some in parts.items() for key in some}}
    stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps(index))
    return folder / f"{stem}.index.json"


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.safetensors", "m.ckpt"])
def test_single_files(tmp_path, name):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(dict(STATE), path)
    same(open_checkpoint(path), STATE)
    same(open_checkpoint(tmp_path if name not in ("m.ckpt",) else path), STATE)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_by_folder_and_by_index(tmp_path, suffix):
    index = write_shards(tmp_path, suffix)
    for source in (tmp_path, index):
        checkpoint = open_checkpoint(source)
        same(checkpoint, STATE)
        assert [path.name for path in checkpoint.files] == [f"part-1{suffix}", f"part-2{suffix}"]
        assert checkpoint.nbytes == sum((tmp_path / f"part-{i}{suffix}").stat().st_size for i in (1, 2))


def test_a_safetensors_file_with_another_name_is_recognised(tmp_path):
    save_file(dict(STATE), tmp_path / "weights.bin")
    assert open_checkpoint(tmp_path / "weights.bin").format == "safetensors"


def test_folders_of_links_as_in_the_hugging_face_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(blobs, ".safetensors")
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    same(open_checkpoint(snapshot), STATE)


def test_views_slices_and_strides_in_a_torch_file(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {"rows": base[1:3], "columns": base[:, 1:4], "transposed": base.T, "every": base[::2, ::3], "base": base}
    torch.save(state, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    same(checkpoint, state)
    assert all(ref.read().is_contiguous() for ref in checkpoint.tensors.values())


def test_shared_memory_is_noticed(tmp_path):
    weight = torch.randn(4, 3)
    torch.save({"embedding.weight": weight, "head.weight": weight, "copy": weight.clone()}, tmp_path / "m.pt")
    tensors = open_checkpoint(tmp_path / "m.pt").tensors
    assert {key: ref.alias_of for key, ref in tensors.items()} == {
        "embedding.weight": None,
        "head.weight": "embedding.weight",
        "copy": None,
    }


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, "read from 'state_dict'; left behind: epoch"),
        (lambda state: {"model_state": state, "optimizer_state": {"lr": 0.1}}, "left behind: optimizer_state"),
        (lambda state: {"model": state, "model_ema": state}, "read from 'model_ema'"),
        (lambda state: {"module." + key: value for key, value in state.items()}, "prefix 'module.' removed"),
        (lambda state: {"_orig_mod." + key: value for key, value in state.items()}, "prefix '_orig_mod.' removed"),
        (lambda state: {"model": {"state_dict": state}}, "read from 'state_dict'"),
        (lambda state: {**state, "epoch": 3}, "not tensors, left behind: epoch"),
    ],
)
def test_wrappers_are_unwrapped_and_said(tmp_path, wrap, note):
    torch.save(wrap(dict(STATE)), tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    same(checkpoint, STATE)
    assert any(note in said for said in checkpoint.notes)


def test_both_prefixes_in_either_order(tmp_path):
    for prefix in ("module._orig_mod.", "_orig_mod.module."):
        torch.save({prefix + key: value for key, value in STATE.items()}, tmp_path / "m.pt")
        same(open_checkpoint(tmp_path / "m.pt"), STATE)


def test_legacy_files_are_read_whole_and_it_is_said(tmp_path):
    torch.save(dict(STATE), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    same(checkpoint, STATE)
    assert "written by torch before 1.6: read whole, not a tensor at a time; torch.save it again" in checkpoint.notes
    # and so it goes away
    torch.save({key: ref.read() for key, ref in checkpoint.tensors.items()}, tmp_path / "m.pt")
    assert not open_checkpoint(tmp_path / "m.pt").notes


def test_dtypes_of_the_table_are_those_of_the_library(tmp_path):
    for dtype in DTYPES.values():
        save_file({"x": torch.zeros(2).to(dtype)}, tmp_path / "m.safetensors")
        ref = open_checkpoint(tmp_path / "m.safetensors").tensors["x"]
        assert ref.dtype == dtype == ref.read().dtype


class Runs:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, legacy):
    mark = tmp_path / "ran"
    torch.save({"w": Runs(mark)}, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UnsafeCheckpointError, match=r"holds a pickled 'posix\.mkdir', and reading that would run code"):
        open_checkpoint(tmp_path / "m.pt")
    assert not mark.exists()


def test_a_plain_pickle_that_would_run_code_is_refused(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Runs(mark)))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "m.pt")
    assert not mark.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pickled_module_is_refused_with_the_way_out(tmp_path, legacy):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UnsafeCheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*torch\.save\(model\.state_dict"
    ):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_other_archives_are_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"a TorchScript archive.*torch\.jit\.load\('m\.pt'\)\.state_dict\(\)"):
        open_checkpoint(tmp_path / "m.pt")
    # and the way out that the message names works
    torch.save(torch.jit.load(tmp_path / "m.pt").state_dict(), tmp_path / "weights.pt")
    assert set(open_checkpoint(tmp_path / "weights.pt").tensors) == {"weight", "bias"}
    with zipfile.ZipFile(tmp_path / "z.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        open_checkpoint(tmp_path / "z.pt")


def test_files_of_other_worlds_are_named(tmp_path):
    for start, named in ((b"GGUF\x03\0\0\0", "a GGUF file"), (b"\x89HDF\r\n\x1a\n", "an HDF5 file of Keras")):
        (tmp_path / "m.bin").write_bytes(start + bytes(100))
        with pytest.raises(CheckpointError, match=named):
            open_checkpoint(tmp_path / "m.bin")


def test_missing_empty_and_meaningless_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(tmp_path / "none.pt")
    for name in ("e.pt", "e.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match="the file is empty"):
            open_checkpoint(tmp_path / name)
        (tmp_path / name).write_text("hello, this is not a checkpoint at all")
        with pytest.raises(CheckpointError, match="not a"):
            open_checkpoint(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "n.pt")
    with pytest.raises(CheckpointError, match="no tensors in it"):
        open_checkpoint(tmp_path / "n.pt")
    torch.save(torch.zeros(3), tmp_path / "n.pt")
    with pytest.raises(CheckpointError, match="no tensors in it"):
        open_checkpoint(tmp_path / "n.pt")


@pytest.mark.parametrize("keep", [4, 9, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "legacy.pt"])
def test_truncated_files(tmp_path, name, keep):
    path = tmp_path / name
    if name == "m.safetensors":
        save_file(dict(STATE), path)
    else:
        torch.save(dict(STATE), path, _use_new_zipfile_serialization=name == "m.pt")
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_sparse_tensors_are_refused(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"'w' is sparse.*\.to_dense\(\)"):
        open_checkpoint(tmp_path / "m.pt")


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match="no weight file in this folder"):
        open_checkpoint(tmp_path)
    index = write_shards(tmp_path, ".safetensors")
    (tmp_path / "part-2.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"names the shard 'part-2\.safetensors', which is not beside it"):
        open_checkpoint(tmp_path)
    index.write_text('{"weight_map": {"x": "../elsewhere.safetensors"}}')
    with pytest.raises(CheckpointError, match="not beside it"):
        open_checkpoint(tmp_path)
    index.write_text('{"weight_map": {"x": "part-1.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"says 'x' is in part-1\.safetensors, but it is not"):
        open_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not an index of shards"):
        open_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(CheckpointError, match="2 weight files, and no index"):
        open_checkpoint(tmp_path)


def test_a_header_from_the_future_is_an_error(tmp_path):
    save_file(dict(STATE), tmp_path / "m.safetensors", {"format": "pt", "lrconvert": '{"version": 2}'})
    with pytest.raises(CheckpointError, match=r"its lrconvert header cannot be read \(version.*newer lrconvert"):
        open_checkpoint(tmp_path / "m.safetensors")
    save_file(dict(STATE), tmp_path / "m.safetensors", {"format": "pt", "lrconvert": Header().model_dump_json()})
    assert open_checkpoint(tmp_path / "m.safetensors").header == Header()

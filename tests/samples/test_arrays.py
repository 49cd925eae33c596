"""Inputs that are tensors already: how a file's names become arguments, and what is refused."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lrconvert.errors import LrconvertError, UnsafeCheckpointError, UsageError
from lrconvert.network import open_network
from lrconvert.samples import read_samples


class TwoInputs(torch.nn.Module):
    """Two inputs whose sum goes through a layer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, left, right=None):
        return self.layer(left if right is None else left + right)


@pytest.fixture
def network():
    return open_network(TwoInputs())


N = 40
LEFT = np.arange(N * 4, dtype=np.float32).reshape(N, 4)
RIGHT = -2 * LEFT

WRITERS = {
    "npz, one": lambda path: np.savez(path.with_suffix(".npz"), whatever=LEFT),
    "npz, numbered": lambda path: np.savez(path.with_suffix(".npz"), LEFT, RIGHT),
    "npz, named": lambda path: np.savez_compressed(path.with_suffix(".npz"), right=RIGHT, left=LEFT),
    "npy": lambda path: np.save(path.with_suffix(".npy"), LEFT),
    "pt, one": lambda path: torch.save(torch.from_numpy(LEFT), path.with_suffix(".pt")),
    "pt, tuple": lambda path: torch.save((torch.from_numpy(LEFT), torch.from_numpy(RIGHT)), path.with_suffix(".pt")),
    "pth, dict": lambda path: torch.save({"left": torch.from_numpy(LEFT)}, path.with_suffix(".pth")),
    "safetensors, one": lambda path: save_file({"x": torch.from_numpy(LEFT)}, path.with_suffix(".safetensors")),
    "safetensors, named": lambda path: save_file(
        {"right": torch.from_numpy(RIGHT), "left": torch.from_numpy(LEFT)}, path.with_suffix(".safetensors")
    ),
}
# Positional arguments, and names of the others.
SHAPES = {
    "npz, one": (1, set()),
    "npz, numbered": (2, set()),
    "npz, named": (0, {"left", "right"}),
    "npy": (1, set()),
    "pt, one": (1, set()),
    "pt, tuple": (2, set()),
    "pth, dict": (0, {"left"}),
    "safetensors, one": (1, set()),
    "safetensors, named": (0, {"left", "right"}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_arguments_that_its_names_say(name, tmp_path, network):
    WRITERS[name](tmp_path / "inputs")
    (path,) = tmp_path.iterdir()
    found = read_samples(str(path), network, count=N, batch_size=16)
    assert [call.size for call in found.calls] == [16, 16, 8]
    assert found.notes == (f"40 examples of {path}, out of 40",)
    rows = []
    for call in found.calls:
        assert (len(call.args), set(call.kwargs)) == SHAPES[name]
        left, right = [*call.args, call.kwargs.get("left"), call.kwargs.get("right")][:2]
        if right is None:
            left, right = call.kwargs.get("left", left), call.kwargs.get("right")
        if right is not None:
            # Examples keep together: every row of the one still goes with its row of the other.
            assert torch.equal(right, -2 * left)
        rows += left[:, 0].tolist()
    assert sorted(rows) == LEFT[:, 0].tolist()
    assert rows != LEFT[:, 0].tolist()


def test_more_than_ten_numbered_arrays_keep_their_order(tmp_path):
    class Many(torch.nn.Module):
        def forward(self, *parts):
            return torch.cat(parts, 1)

    np.savez(tmp_path / "many.npz", *(np.full((3, 1), number, np.float32) for number in range(12)))
    network = open_network(Many())
    (call,) = read_samples(str(tmp_path / "many.npz"), network).calls
    assert torch.equal(call.run(Many()), torch.arange(12.0).expand(3, 12))


def test_whole_numbers_become_int64(tmp_path):
    np.savez(tmp_path / "ids.npz", np.arange(6, dtype=np.int16).reshape(2, 3))
    network = open_network(torch.nn.Embedding(7, 2))
    (call,) = read_samples(str(tmp_path / "ids.npz"), network).calls
    assert call.args[0].dtype == torch.int64
    assert call.run(torch.nn.Embedding(7, 2)).shape == (2, 3, 2)


class Evil:
    """Whoever unpickles it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_that_a_file_holds_is_run(tmp_path, network):
    torch.save({"x": Evil(tmp_path / "made")}, tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", np.array([Evil(tmp_path / "made")], dtype=object))
    with pytest.raises(UnsafeCheckpointError, match=r"evil.pt: holds more than tensors.*save a tensor"):
        read_samples(str(tmp_path / "evil.pt"), network)
    with pytest.raises(LrconvertError, match=r"evil.npz: .*Object arrays cannot be loaded"):
        read_samples(str(tmp_path / "evil.npz"), network)
    assert not (tmp_path / "made").exists()


def test_what_is_not_inputs_is_described(tmp_path, network):
    def fails(name, match, error=LrconvertError):
        with pytest.raises(error, match=match) as caught:
            read_samples(str(tmp_path / name), network)
        assert "\n" not in str(caught.value)

    torch.save({"epoch": 3, "left": torch.ones(2, 4)}, tmp_path / "a.pt")
    fails("a.pt", "holds a dict of Tensor, int, not a tensor")
    torch.save([], tmp_path / "b.pt")
    fails("b.pt", "holds a list of nothing")
    torch.save(3, tmp_path / "c.pt")
    fails("c.pt", "an object of type int")
    np.savez(tmp_path / "d.npz")
    fails("d.npz", "holds no arrays")
    np.savez(tmp_path / "e.npz", left=np.ones((3, 4)), right=np.ones((2, 4)))
    fails("e.npz", r"shapes \(3, 4\), \(2, 4\): the first dimension of each must be the examples")
    np.save(tmp_path / "f.npy", np.float32(3))
    fails("f.npy", r"shapes \(\): the first dimension")
    np.save(tmp_path / "g.npy", np.array(["a", "b"]))
    fails("g.npy", "arrays must be of numbers")
    np.save(tmp_path / "h.npy", np.ones((0, 4), np.float32))
    fails("h.npy", "the first dimension of each must be the examples")
    np.savez(tmp_path / "i.npz", left=LEFT, middle=LEFT)
    fails("i.npz", "gives left, middle, but the model cannot be called so: .*'middle'", UsageError)


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.pt", "x.safetensors"])
def test_damaged_files_are_named(name, tmp_path, network):
    for content in (b"", b"nothing of the kind", b"\x80\x02" + bytes(50)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LrconvertError, match=name) as caught:
            read_samples(str(tmp_path / name), network)
        assert "\n" not in str(caught.value)

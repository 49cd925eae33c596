"""Writing: other libraries read it, it is atomic, and nothing is overwritten or half-written."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lrconvert
from lrconvert.checkpoints import KEY, Header, check_output, open_checkpoint, write_checkpoint
from lrconvert.errors import CheckpointError, OutputExistsError, UsageError
from lrconvert.plan import LayerPlan, Plan
from lrconvert.rewrite import Rewrite, moving
from lrconvert.tensors import refs_of

STATE = {
    "b": torch.randn(3, 5),
    "a": torch.randn(7).bfloat16(),
    "n": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "f8": torch.randn(5).to(torch.float8_e5m2),
}
HEADER = Header(
    written_by="test",
    model="torchvision/resnet18",
    plan=Plan(layers=(LayerPlan(name="b", weight="b.weight", kind="linear", shape=(3, 5), rank=1),)),
)


def steps_for(state):
    return [moving(key, ref, key) for key, ref in refs_of(state).items()]


def equal(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "m.pth", "m.bin"])
def test_what_is_written_is_read_back_with_its_header(tmp_path, name):
    write_checkpoint(tmp_path / name, steps_for(STATE), HEADER)
    checkpoint = open_checkpoint(tmp_path / name)
    assert set(checkpoint.tensors) == set(STATE)
    assert all(equal(checkpoint.tensors[key].read(), tensor) for key, tensor in STATE.items())
    assert checkpoint.header == HEADER
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_safetensors_library_reads_what_we_stream(tmp_path):
    write_checkpoint(tmp_path / "m.safetensors", steps_for(STATE), HEADER)
    assert all(equal(tensor, STATE[key]) for key, tensor in load_file(tmp_path / "m.safetensors").items())
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert all(isinstance(value, str) for value in metadata.values())


def test_torch_reads_what_we_write_with_weights_only(tmp_path):
    write_checkpoint(tmp_path / "m.pt", steps_for(STATE), HEADER)
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    assert set(content) == {"state_dict", KEY}
    assert list(content["state_dict"]) == list(STATE)


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=10).filter(lambda key: key != "__metadata__"),
        st.tuples(
            st.lists(st.integers(0, 4), max_size=4),
            st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.float64, torch.uint8]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_safetensors_round_trip_of_any_state_dict(tmp_path_factory, layout):
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    state = {key: torch.randint(0, 2, shape).to(dtype) for key, (shape, dtype) in layout.items()}
    write_checkpoint(path, steps_for(state), None)
    read = open_checkpoint(path).tensors
    assert set(read) == set(state)
    assert all(torch.equal(read[key].read(), tensor) for key, tensor in state.items())


def test_an_existing_output_is_refused_before_any_work(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("precious")

    def never():
        raise AssertionError("work was done for an output that exists")

    step = Rewrite("x", {"x": ((1,), torch.float32)}, 1, never)
    with pytest.raises(OutputExistsError, match="exists; choose another output or add --overwrite"):
        write_checkpoint(path, [step], None)
    assert path.read_text() == "precious"
    write_checkpoint(path, steps_for(STATE), None, overwrite=True)
    assert set(open_checkpoint(path).tensors) == set(STATE)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, CheckpointError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "m.safetensors"
    path.write_text("precious")

    def fail():
        raise error("stop")

    steps = [*steps_for(STATE), Rewrite("x", {"x": ((1,), torch.float32)}, 1, fail)]
    with pytest.raises(error):
        write_checkpoint(path, steps, None, overwrite=True)
    assert path.read_text() == "precious"
    assert [each.name for each in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("name", ["big.safetensors", "big.pt"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, name):
    # A limit on the size of files makes the system refuse to write on, as a full disk does.
    program = textwrap.dedent(
        f"""
        import resource, sys, torch
        from pathlib import Path
        from lrconvert.checkpoints import write_checkpoint
        from lrconvert.errors import CheckpointError
        from lrconvert.rewrite import moving
        from lrconvert.tensors import refs_of
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        steps = [moving(k, r, k) for k, r in refs_of({{"w": torch.zeros(1_000_000)}}).items()]
        try:
            write_checkpoint(Path({str(tmp_path / name)!r}), steps, None)
        except CheckpointError as error:
            print(error)
            sys.exit(7)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder; create it first"):
        write_checkpoint(tmp_path / "none" / "m.safetensors", steps_for(STATE), None)


def test_a_dtype_that_safetensors_cannot_hold(tmp_path):
    state = {"z": torch.zeros(2, dtype=torch.complex128)}
    with pytest.raises(CheckpointError, match=r"'z' is torch\.complex128"):
        write_checkpoint(tmp_path / "m.safetensors", steps_for(state), None)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of two shards with everything around them."""
    source = tmp_path / "source"
    (source / "extra").mkdir(parents=True)
    save_file({"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4)}, source / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.randn(4, 4)}, source / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(("a.weight", "a.bias"), "model-00001-of-00002.safetensors")
    weight_map["b.weight"] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, text in {
        "config.json": "{}",
        "README.md": "---\nlicense: mit\n---\n# Model\n",
        "extra/vocab.txt": "a",
        "pytorch_model.bin": "dense twin",
        "model.onnx": "dense twin",
    }.items():
        (source / name).write_text(text)
    return source


def test_a_folder_becomes_a_folder(folder, tmp_path):
    source = open_checkpoint(folder)
    out = tmp_path / "out"
    steps = [moving(key, ref, key) for key, ref in source.tensors.items()]
    write_checkpoint(out, steps, HEADER, source)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "README.md",
        "config.json",
        "extra/vocab.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    written = open_checkpoint(out)
    assert written.header == HEADER
    assert all(torch.equal(written.tensors[key].read(), ref.read()) for key, ref in source.tensors.items())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == (16 + 4 + 16) * 4
    assert index["weight_map"] == {key: source_name for source_name, key in _where(source)}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n")
    assert card.index("lrconvert.load") < card.index("# Model")


STALE = [
    *("model.fp16.safetensors", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.gguf", "model.tflite"),
    *("openvino_model.xml", "openvino_model.bin", "consolidated.00.pth", "onnx/model.onnx", "original/tokenizer.model"),
    *("checkpoint-500/model.safetensors", "model.ckpt.index", "model.ckpt.data-00000-of-00001", "model.onnx.data"),
]
TRAINING = ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"]
KEPT = [
    "tokenizer.json",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "generation_config.json",
    "spiece.model",
]


def test_no_stale_copy_of_the_weights_is_carried_over(folder, tmp_path):
    for name in (*STALE, *TRAINING, *KEPT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    before = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    record = lrconvert.factorize(folder, "rank=1", output=tmp_path / "out", keep_first=0, keep_last=False)
    after = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    gone = before - after
    assert gone == {*STALE, *TRAINING, "pytorch_model.bin", "model.onnx"}
    assert set(KEPT) <= after
    copies, training = record.notes[-2:]
    assert copies.startswith("other copies of the dense weights, not carried over: ")
    assert set(copies.split(": ")[1].split(", ")) == {name.split("/")[0] for name in gone} - set(TRAINING)
    assert training == f"training state of the dense network, not carried over: {', '.join(sorted(TRAINING))}"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_files_own_metadata_is_carried_over(tmp_path, kind):
    source, out = tmp_path / "source", tmp_path / ("out" if kind == "folder" else "out.safetensors")
    source.mkdir()
    state = {f"{name}.weight": torch.randn(16, 16) for name in "abc"}
    about = {
        "format": "np",
        "modelspec.title": "a ☃ model",
        "lrconvert": Header(written_by="an older one").model_dump_json(),
    }
    # the library's save_model notes a tied tensor there; what shares its memory is said in our own header
    save_file(state, source / "model.safetensors", {**about, "tied.weight": "a.weight"})
    given = source if kind == "folder" else source / "model.safetensors"
    lrconvert.factorize(given, "rank=4", output=out, keep_first=0)
    with safe_open(out / "model.safetensors" if kind == "folder" else out, "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("lrconvert") != about["lrconvert"]
    assert metadata == {"format": "pt", "modelspec.title": "a ☃ model"}


def _where(checkpoint):
    return [(path.name, key) for path, keys in checkpoint.files.items() for key in keys]


def test_only_our_own_folders_are_replaced(folder, tmp_path):
    source = open_checkpoint(folder)
    steps = [moving(key, ref, key) for key, ref in source.tensors.items()]
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="is not a folder that lrconvert wrote"):
        write_checkpoint(home, steps, HEADER, source, overwrite=True)
    for inside in (folder, folder / "small"):
        with pytest.raises(UsageError, match="lies inside"):
            write_checkpoint(inside, steps, HEADER, source, overwrite=True)
    assert (home / "thesis.tex").read_text() == "precious"
    out = tmp_path / "out"
    write_checkpoint(out, steps, HEADER, source)
    (out / "stale.txt").touch()
    with pytest.raises(OutputExistsError, match="exists"):
        write_checkpoint(out, steps, HEADER, source)
    write_checkpoint(out, steps, HEADER, source, overwrite=True)
    assert not (out / "stale.txt").exists()


def test_outputs_whose_format_is_unclear(folder, tmp_path):
    file = tmp_path / "m.pt"
    torch.save(STATE, file)
    with pytest.raises(UsageError, match=r"end the output in \.safetensors or \.pt"):
        check_output(tmp_path / "out", open_checkpoint(file), False)
    with pytest.raises(UsageError, match="end the output in"):
        check_output(tmp_path / "out.onnx", open_checkpoint(file), False)
    (tmp_path / "dir.pt").mkdir()
    with pytest.raises(OutputExistsError, match="is a folder"):
        check_output(tmp_path / "dir.pt", open_checkpoint(file), True)
    check_output(tmp_path / "single.safetensors", open_checkpoint(folder), False)

"""What graphs are made of around their operators: bodies, shared weights, types, names, data in other files."""

import json

import numpy as np
import onnx
import pytest
import torch
from graphs import FLOAT, graph, ops, random, run, tensor
from helpers import assert_close
from onnx import TensorProto, helper, numpy_helper

import lrconvert
from lrconvert.network import open_network
from lrconvert.onnx_graph import graph as graph_module
from lrconvert.onnx_graph import save

X = random(4, 16, scale=1)


def chain(path, weights, opset=18, kind=FLOAT):
    """x, multiplied by each of `weights` (name to array) in turn."""
    nodes, name = [], "x"
    for index, weight in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [name, weight], [out := f"h{index}"], name=f"/block.{index}/MatMul"))
        name = out
    nodes[-1].output[0] = "y"
    return graph(path, nodes, {"x": [None, 16]}, weights, opset=opset, kind=kind)


def factorize(path, output, rule="rank=3", **settings):
    return lrconvert.factorize(path, rule, output=output, **({"keep_first": 0, "keep_last": False} | settings))


def layer(path, name):
    return next(each for each in open_network(path).layers if each.name == name)


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_opsets(tmp_path, opset):
    path = chain(tmp_path / "a.onnx", {"a": random(16, 20), "b": random(20, 12)}, opset=opset)
    record = factorize(path, tmp_path / "b.onnx")
    assert record.difference <= 1e-4
    assert record.checked_with.startswith("onnxruntime")
    assert record.order == "execution"
    assert onnx.load(tmp_path / "b.onnx").opset_import[0].version == opset


def test_an_old_opset_is_refused_in_one_line(tmp_path, cli):
    path = chain(tmp_path / "a.onnx", {"a": random(16, 20), "b": random(20, 12)}, opset=9)
    assert "opset 9 is too old" in cli.fails(1, "factorize", path, "-o", tmp_path / "b.onnx", "--rank", "3")
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT16, torch.float16), (TensorProto.DOUBLE, torch.float64)])
def test_types_are_kept(tmp_path, kind, dtype):
    numpy_type = helper.tensor_dtype_to_np_dtype(kind)
    weights = {"a": random(16, 20).astype(numpy_type), "b": random(20, 12).astype(numpy_type)}
    path = chain(tmp_path / "a.onnx", weights, kind=kind)
    record = factorize(path, tmp_path / "b.onnx")
    assert record.difference is not None
    assert open_network(tmp_path / "b.onnx").tensors["a.u"].dtype == dtype


def test_bfloat16_is_kept_where_the_runtime_can_only_say_no(tmp_path):
    constants = {
        name: numpy_helper.from_array(
            random(*shape).astype(helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)), name
        )
        for name, shape in {"a": (16, 20), "b": (20, 12)}.items()
    }
    path = chain(tmp_path / "a.onnx", constants, kind=TensorProto.BFLOAT16)
    record = factorize(path, tmp_path / "b.onnx")
    assert open_network(tmp_path / "b.onnx").tensors["a.u"].dtype == torch.bfloat16
    assert (record.difference is None) == any("not checked" in note for note in record.notes)


def test_typed_fields_are_read_as_raw_data_is(tmp_path):
    weight = random(16, 20)
    spelled = helper.make_tensor("a", FLOAT, weight.shape, weight.ravel().tolist())
    assert not spelled.HasField("raw_data")
    path = chain(tmp_path / "a.onnx", {"a": spelled, "b": random(20, 12)})
    assert torch.equal(open_network(path).tensors["a"].read(), torch.from_numpy(weight).T)


def test_a_weight_that_two_operators_share_stays_shared(tmp_path):
    weight = random(16, 16)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w"], ["y"], transB=1),
    ]
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, 16]}, {"w": weight})
    record = factorize(path, tmp_path / "b.onnx")
    assert [row.rank for row in record.layers] == [3]
    assert record.num_params_after == 3 * 32
    w = torch.from_numpy(weight).double()
    u, s, v = torch.linalg.svd(w)
    w = u[:, :3] * s[:3] @ v[:3]
    want = torch.relu(torch.from_numpy(X).double() @ w) @ w.T
    assert_close(run(tmp_path / "b.onnx", x=X)[0], want.float())


def test_a_table_that_is_looked_up_stays_dense_and_so_does_what_shares_it(tmp_path):
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Gather", ["tied", "ids"], ["f"]),
        helper.make_node("Add", ["e", "f"], ["g"]),
        helper.make_node("MatMul", ["g", "w"], ["h"]),
        helper.make_node("Transpose", ["tied"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [None, None])
    constants = {"table": random(30, 16), "tied": random(30, 16), "w": random(16, 16)}
    path = graph(tmp_path / "a.onnx", nodes, {"ids": ids}, constants)
    record = factorize(path, tmp_path / "b.onnx")
    reasons = {row.name: row.reason for row in record.layers}
    assert reasons["table"].startswith("embedding")
    assert reasons["tied"] == "shared with Gather, which cannot use factors"
    assert [row.name for row in record.layers if row.rank] == ["w"]
    assert record.difference <= 1e-4


def test_quantized_weights_stay_dense_with_the_reason(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "a"], ["y"]),
    ]
    constants = {
        "q": np.random.default_rng(0).integers(-99, 99, (16, 16), dtype=np.int8),
        "scale": np.float32(0.01),
        "a": random(16, 16),
    }
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, 16]}, constants)
    assert layer(path, "q").dense_reason == "quantized: DequantizeLinear reads it"
    assert open_network(path).num_params == 2 * 16 * 16
    assert list(lrconvert.analyze(path).spectra) == ["a"]
    assert [row.name for row in factorize(path, tmp_path / "b.onnx").layers if row.rank] == ["a"]


def branches(path, same_names):
    """If with a weight of its own in each branch, and one of the outer graph in both."""

    def branch(name, weight):
        nodes = [
            helper.make_node("Constant", [], [name], value=tensor(name, weight)),
            helper.make_node("MatMul", ["x", name], [f"{name}.h"]),
            helper.make_node("MatMul", [f"{name}.h", "outer"], [f"{name}.y"]),
        ]
        outputs = [helper.make_tensor_value_info(f"{name}.y", FLOAT, None)]
        return helper.make_graph(nodes, name, [], outputs, [])

    names = ["own", "own"] if same_names else ["then.weight", "else.weight"]
    body = {
        "then_branch": branch(names[0], random(16, 16)),
        "else_branch": branch(names[1], random(16, 16)),
    }
    nodes = [helper.make_node("Equal", ["n", "five"], ["c"]), helper.make_node("If", ["c"], ["y"], **body)]
    number = helper.make_tensor_value_info("n", TensorProto.INT64, [])
    return graph(path, nodes, {"x": [None, 16], "n": number}, {"outer": random(16, 16), "five": np.int64(5)})


@pytest.mark.parametrize("same_names", [False, True])
def test_weights_in_branches_are_factorized_where_they_are(tmp_path, same_names):
    path, small, back = branches(tmp_path / "a.onnx", same_names), tmp_path / "b.onnx", tmp_path / "c.onnx"
    record = factorize(path, small)
    assert len([row for row in record.layers if row.rank]) == 3
    assert record.num_params_after == 3 * 3 * 32
    # both branches were run: the number that the graph compares its input with is tried too
    assert record.notes[-1].count("n ()") == 2
    lrconvert.export(small, back, "dense")
    for number in (5, 0):
        feed = {"x": X, "n": np.int64(number)}
        assert_close(run(small, **feed)[0], run(back, **feed)[0])
        error = (run(small, **feed)[0] - run(path, **feed)[0]).norm() / run(path, **feed)[0].norm()
        assert 0.1 < error < 2  # of random weights, nearly all is lost


def test_branches_that_give_their_recurrent_weights_the_same_names(tmp_path):
    def branch(seed):
        torch.manual_seed(seed)
        nodes = [helper.make_node("RNN", ["x", "W", "R"], ["y.h"], hidden_size=16, name="rnn")]
        weights = [tensor("W", random(1, 16, 16)), tensor("R", random(1, 16, 16))]
        return helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("y.h", FLOAT, None)], weights)

    nodes = [
        helper.make_node("Equal", ["n", "five"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branch(1), else_branch=branch(2)),
    ]
    number = helper.make_tensor_value_info("n", TensorProto.INT64, [])
    path = graph(tmp_path / "a.onnx", nodes, {"x": [3, 4, 16], "n": number}, {"five": np.int64(5)})
    record = factorize(path, tmp_path / "b.onnx")
    assert [row.name for row in record.layers if row.rank] == ["W", "R", "W#2", "R#2"]
    assert record.difference <= 1e-4
    assert lrconvert.export(tmp_path / "b.onnx", tmp_path / "c.onnx", "dense").difference <= 1e-4
    rows = lrconvert.compare(path, tmp_path / "b.onnx").layers
    assert [row.difference for row in rows] == pytest.approx([row.error for row in record.layers], abs=1e-5)


def test_a_weight_used_in_a_loop(tmp_path):
    body = helper.make_graph(
        [helper.make_node("MatMul", ["state", "w"], ["next"]), helper.make_node("Identity", ["go"], ["still"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    nodes = [helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)]
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, 16]}, {"times": np.int64(3), "w": random(16, 16, scale=0.5)})
    assert factorize(path, tmp_path / "b.onnx").difference <= 1e-4


def test_constants_that_are_inputs_with_defaults(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, 16], "w": [16, 16]}, {"w": random(16, 16)})
    factorize(path, tmp_path / "b.onnx")
    assert [given.name for given in onnx.load(tmp_path / "b.onnx").graph.input] == ["x"]
    assert run(tmp_path / "b.onnx", x=X)[0].shape == (4, 16)


def test_names_come_from_weights_from_biases_and_from_operators_and_are_unique(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h0"]),
        helper.make_node("MatMul", ["h0", "val_3"], ["h1"], name="node_1"),
        helper.make_node("Add", ["b.bias", "h1"], ["h2"]),
        helper.make_node("MatMul", ["h2", "onnx::MatMul_12"], ["h3"], name="/c/MatMul"),
        helper.make_node("Add", ["h3", "a.u.weight"], ["y"]),
    ]
    constants = {"a.weight": random(16, 16), "val_3": random(16, 16), "onnx::MatMul_12": random(16, 16)}
    constants |= {"b.bias": random(16), "a.u.weight": random(16)}
    path = graph(tmp_path / "a.onnx", nodes, {"x": [None, 16]}, constants)
    record = factorize(path, tmp_path / "b.onnx")
    assert [row.name for row in record.layers] == ["a", "b", "/c/MatMul"]
    found = open_network(tmp_path / "b.onnx").tensors
    assert {"a.u.weight", "a.u.weight_1", "a.v.weight", "val_3.u", "onnx::MatMul_12.v"} <= set(found)
    assert torch.equal(found["a.u.weight"].read(), open_network(path).tensors["a.u.weight"].read())


@pytest.fixture
def beside(tmp_path):
    """A graph with its weights in another file."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = chain(folder / "a.onnx", {"a": random(16, 20), "b": random(20, 30), "c": random(30, 12)})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data_stays_external_and_untouched_tensors_byte_for_byte(beside, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_SMALL", 16)
    small, back = tmp_path / "b.onnx", tmp_path / "c.onnx"
    record = factorize(beside, small, exclude=["c"])
    assert record.difference <= 1e-4
    assert record.nbytes_before > (beside.parent / "weights.bin").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.onnx", "b.onnx.data", "in"]
    outside = {each.name for each in onnx.load(small, load_external_data=False).graph.initializer if each.external_data}
    assert outside == {"a.u", "a.v", "b.u", "b.v", "c"}
    before, after = open_network(beside).tensors["c"].read(), open_network(small).tensors["c"].read()
    assert torch.equal(before, after)
    assert lrconvert.info(small).num_params == record.num_params_after
    assert lrconvert.export(small, back, "dense").difference <= 1e-4
    assert_close(run(back, x=X)[0], run(small, x=X)[0])


def test_what_one_message_cannot_hold_goes_beside_it(tmp_path, monkeypatch):
    path = chain(tmp_path / "a.onnx", {"a": random(16, 200), "b": random(200, 12)})
    monkeypatch.setattr(save, "INLINE_LIMIT", 1000)
    monkeypatch.setattr(save, "_SMALL", 64)
    assert factorize(path, tmp_path / "b.onnx").difference <= 1e-4
    assert (tmp_path / "b.onnx.data").exists()
    assert (tmp_path / "b.onnx").stat().st_size < path.stat().st_size / 3


def test_data_beside_a_graph_is_not_overwritten_by_chance(beside, tmp_path):
    (tmp_path / "b.onnx.data").write_bytes(b"mine")
    with pytest.raises(lrconvert.LrconvertError, match=r"b\.onnx\.data exists"):
        factorize(beside, tmp_path / "b.onnx", exclude=["c"])
    assert (tmp_path / "b.onnx.data").read_bytes() == b"mine"
    assert not (tmp_path / "b.onnx").exists()


def test_missing_short_and_foreign_external_data(beside, cli):
    data = beside.parent / "weights.bin"
    content = data.read_bytes()
    data.write_bytes(content[:-8])
    assert "ends before the tensors" in cli.fails(1, "analyze", beside)
    data.unlink()
    assert "copy that file too" in cli.fails(1, "analyze", beside)
    (beside.parent.parent / "weights.bin").write_bytes(content)
    model = onnx.load(beside, load_external_data=False)
    for each in model.graph.initializer:
        each.external_data[0].value = "../weights.bin"
    beside.write_bytes(model.SerializeToString())
    assert "not there" in cli.fails(1, "analyze", beside)


@pytest.mark.parametrize("content", [b"junk", b"\x08\x08", b"\x00" * 64], ids=["junk", "empty graph", "zeros"])
def test_a_file_that_is_no_graph_gives_one_line(tmp_path, cli, content):
    (tmp_path / "a.onnx").write_bytes(content)
    assert "not an ONNX graph" in cli.fails(1, "analyze", tmp_path / "a.onnx")


def test_a_cut_file_gives_one_line(tmp_path, cli):
    path = chain(tmp_path / "a.onnx", {"a": random(16, 200), "b": random(200, 12)})
    path.write_bytes(path.read_bytes()[:-5000])
    assert "not an ONNX graph" in cli.fails(1, "factorize", path, "-o", tmp_path / "b.onnx", "--auto")


def test_a_wrong_result_is_not_kept(tmp_path, cli, monkeypatch):
    path = chain(tmp_path / "a.onnx", {"a": random(16, 20), "b": random(20, 12)})
    right = graph_module.product_of
    monkeypatch.setattr(graph_module, "product_of", lambda *arguments: right(*arguments) * 1.01)
    line = cli.fails(4, "factorize", path, "-o", tmp_path / "b.onnx", "--rank", "3", "--keep-first", "0")
    assert "differs from what merged weights compute" in line
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]


def test_a_graph_that_cannot_be_run_is_written_and_that_is_said(tmp_path):
    nodes = [
        helper.make_node("Whatever", ["x"], ["h"], domain="nowhere"),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    constants = [tensor("w", random(16, 16))]
    inputs = [helper.make_tensor_value_info("x", FLOAT, [1, 16])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, [1, 16])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, constants), opset_imports=opsets)
    onnx.save(model, tmp_path / "a.onnx")
    record = factorize(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert record.difference is None
    assert record.checked_with is None
    assert "not checked: onnxruntime cannot load this graph" in record.notes[-1]
    assert ops(tmp_path / "b.onnx") == {"Whatever": 1, "MatMul": 2}


def test_plan_dry_run_json_and_info(tmp_path, cli):
    path = chain(tmp_path / "a.onnx", {"a": random(16, 20), "b": random(20, 24), "c": random(24, 12)})
    plan, small = tmp_path / "plan.json", tmp_path / "b.onnx"
    done = cli("factorize", path, "--rank-ratio", "0.25", "--dry-run", "--save-plan", plan, "--json")
    assert done.code == 0
    assert [row["rank"] for row in json.loads(done.out)["layers"]] == [None, 5, None]
    assert not small.exists()
    assert cli("factorize", path, "--plan", plan, "-o", small).code == 0
    assert "exists" in cli.fails(1, "factorize", path, "--plan", plan, "-o", small)
    assert cli("factorize", path, "--plan", plan, "-o", small, "--overwrite").code == 0
    described = json.loads(cli("info", small, "--json").out)
    assert described["format"] == "onnx"
    assert [row["name"] for row in described["low_rank"]] == ["b"]
    assert described["num_params_dense"] == 16 * 20 + 20 * 24 + 24 * 12
    assert "factorized already" in cli.fails(1, "factorize", small, "-o", tmp_path / "c.onnx", "--auto")
    record = json.loads(cli("compare", path, small, "--json").out)
    assert 0.1 < record["output_difference"] < 2
    assert record["first"]["latency_ms"] > 0
    assert "onnxruntime" in record["latency_note"]
    rows = record["layers"]
    assert {row["name"]: row["rank"] for row in rows} == {"a": [None, None], "b": [None, 5], "c": [None, None]}
    assert rows[1]["difference"] == pytest.approx(described["low_rank"][0]["error"], abs=1e-5)


def test_a_plan_for_another_graph_is_refused(tmp_path):
    path = chain(tmp_path / "a.onnx", {"a": random(16, 20), "b": random(20, 24), "c": random(24, 12)})
    other = chain(tmp_path / "b.onnx", {"a": random(16, 20), "b": random(20, 28), "c": random(28, 12)})
    plan = lrconvert.make_plan(path, "rank=3")
    with pytest.raises(lrconvert.LrconvertError, match="the plan says"):
        lrconvert.factorize(other, plan, output=tmp_path / "c.onnx")
    normed = plan.model_copy(update={"layers": tuple(each.model_copy(update={"norm": True}) for each in plan.layers)})
    with pytest.raises(lrconvert.LrconvertError, match="b: a graph takes no norm between factors"):
        lrconvert.factorize(path, normed, output=tmp_path / "c.onnx")
    pivoted = plan.model_copy(
        update={"layers": tuple(each.model_copy(update={"pivoted": True}) for each in plan.layers)}
    )
    with pytest.raises(lrconvert.LrconvertError, match="no pivoted factors"):
        lrconvert.factorize(path, pivoted, output=tmp_path / "c.onnx")


def test_what_makes_no_sense_for_a_graph_is_refused_in_one_line(tmp_path, cli):
    path = chain(tmp_path / "a.onnx", {"a": random(16, 20), "b": random(20, 12)})
    assert "end the output in .onnx" in cli.fails(2, "factorize", path, "-o", tmp_path / "b.safetensors", "--auto")
    for option in (["--extra-bn"], ["--view", "spatial"], ["--pivoted"]):
        line = cli.fails(2, "factorize", path, "-o", tmp_path / "b.onnx", "--auto", *option)
        assert "no extra BatchNorm, no spatial view, no pivoted factors" in line
    assert "needs no model" in cli.fails(2, "analyze", path, "--model", "torchvision/resnet18")
    assert "a graph already" in cli.fails(2, "export", path, "-o", tmp_path / "c.pt2", "-f", "pt2")
    assert "is dense already" in cli.fails(2, "export", path, "-o", tmp_path / "c.onnx", "-f", "dense")
    with pytest.raises(lrconvert.LrconvertError, match="onnxruntime runs it"):
        lrconvert.load(path)

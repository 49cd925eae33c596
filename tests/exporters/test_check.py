"""An export that computes something else is not kept."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lrconvert.checkpoints import KEY, Header
from lrconvert.errors import ModelError, VerificationError
from lrconvert.exporters import GRAPHS
from lrconvert.exporters.check import check_against, relative_difference
from lrconvert.inputs import one_input
from lrconvert.outputs import tensors_in

PATH = Path("x.onnx")


def test_relative_difference():
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(1 / 34**0.5)
    assert relative_difference(torch.tensor([2.0]), torch.tensor([0.0])) == 2.0


def test_tensors_in_nested_outputs():
    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [len(tensor) for tensor in tensors_in({"a": one, "b": (two, [three, None])})] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: [out * 1.01], "outputs differ from the model's by 1.0e-02"),
        (lambda out: [out, out], "2 outputs, the model has 1"),
        (lambda out: [out[:, :1]], "where the model gives"),
        (lambda out: [out * float("nan")], "finite or not"),
    ],
)
def test_a_wrong_graph_is_refused(change, message):
    model = nn.Linear(4, 3).eval()
    with pytest.raises(VerificationError, match=message):
        check_against(model, lambda x, _: change(model(*x).detach()), one_input((4,)), 1e-4, PATH)
    assert check_against(model, lambda x, _: [model(*x).detach()], one_input((4,)), 1e-4, PATH) == 0.0


class Branches(nn.Module):
    """Its path depends on the data, which no exporter can follow."""

    def __init__(self):
        super().__init__()
        self.it = nn.Linear(4, 3)

    def forward(self, x):
        return self.it(x) if x.sum() > 0 else self.it(-x)


@pytest.mark.parametrize("target", sorted(GRAPHS))
def test_a_model_that_cannot_be_exported_is_one_line(target, tmp_path):
    with pytest.raises(ModelError, match="torch cannot export this model") as raised:
        GRAPHS[target](Branches().eval(), one_input((4,)), tmp_path / f"m.{target}", Header(), 1e-4)
    assert "\n" not in str(raised.value)


def test_graphs_carry_the_header(tmp_path):
    import onnx

    header = Header(written_by="test", input_shape=(4,))
    for target, write in GRAPHS.items():
        write(nn.Linear(4, 3).eval(), one_input((4,)), tmp_path / f"m.{target}", header, 1e-4)
    found = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert Header.model_validate_json(found[KEY]) == header
    extra = {KEY: ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert Header.model_validate_json(extra[KEY]) == header

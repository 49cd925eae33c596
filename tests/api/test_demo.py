"""The demo, as the README runs it."""

import pytest

import lrconvert
from lrconvert.api.demo import run_demo
from lrconvert.errors import OutputExistsError


@pytest.mark.slow
def test_the_demo_does_the_whole_job(tmp_path):
    said, shown = [], []
    record = run_demo(tmp_path / "demo", say=said.append, show=shown.append)
    steps = {step.name: step for step in record.steps}
    dense, tuned, graph = steps["dense"], steps["low rank, fine-tuned"], steps["the same in ONNX"]
    assert dense.accuracy > 0.95
    assert tuned.num_params < dense.num_params / 2
    assert tuned.macs < dense.macs / 2
    assert tuned.nbytes < dense.nbytes / 2
    assert tuned.accuracy > dense.accuracy - 0.02
    assert graph.accuracy == tuned.accuracy
    assert [each.command for each in shown] == ["analyze", "factorize", "export"]
    assert len(said) == 6
    loaded = lrconvert.load(tmp_path / "demo" / "finetuned" / "best.safetensors")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == tuned.num_params
    with pytest.raises(OutputExistsError, match=r"lowrank\.safetensors exists"):
        run_demo(tmp_path / "demo")

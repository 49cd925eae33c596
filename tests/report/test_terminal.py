"""Tables say what the record says."""

import io
import re

import pytest
import torch
from rich.console import Console

import lrconvert
from lrconvert.api.analyze import analyze_record
from lrconvert.models.zoo.digits_cnn import DigitsCNN
from lrconvert.report.record import Record
from lrconvert.report.terminal import count, render, shape_text, spectrum_picture


def printed(record, width=80, verbose=False):
    file = io.StringIO()
    render(record, Console(file=file, width=width, markup=False), verbose=verbose)
    return file.getvalue()


@pytest.fixture
def record(tmp_path):
    lrconvert.save(DigitsCNN(), tmp_path / "d.safetensors", architecture="zoo/digits_cnn")
    return lrconvert.factorize(tmp_path / "d.safetensors", "rank_ratio=0.25", output=tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "–"), (0, "0"), (999, "999"), (1000, "1.00 k"), (25_557_032, "25.56 M"), (4_089_184_256, "4.09 G")],
)
def test_count(number, text):
    assert count(number) == text


def test_shape_text():
    assert shape_text((64, 3, 7, 7)) == "64×3×7×7"


def test_spectrum_picture_falls_as_the_values_do():
    assert spectrum_picture((1.0, 0.1, 0.01, 0.001, 0.0), 5) == "█▆▃▁▁"
    assert spectrum_picture((1.0,), 12) == "█"
    assert spectrum_picture((), 12) == ""
    bars = spectrum_picture([0.9**i for i in range(24)], 12)
    assert len(bars) == 12
    assert list(bars) == sorted(bars, reverse=True)


@pytest.mark.parametrize("width", [80, 120, 200])
def test_columns_add_up_to_the_totals(record, width):
    rows = record.layers
    dense = record.num_params_before - sum(row.num_params_before for row in rows)
    assert dense + sum(row.num_params_after for row in rows) == record.num_params_after
    assert sum(row.macs_before for row in rows) == record.macs_before
    assert sum(row.macs_after for row in rows) == record.macs_after
    text = printed(record, width)
    ratio = f"{record.num_params_after / record.num_params_before:.3f}"
    assert re.search(rf"parameters +{re.escape(count(record.num_params_before))} .* {ratio}", text)
    assert max(map(len, text.splitlines())) <= width


def test_dense_layers_are_summed_up_or_listed(record):
    short, full = printed(record), printed(record, verbose=True, width=150)
    assert "1 × first layer" in short
    assert "conv1" not in short
    assert re.search(r"conv1 .*dense.*first layer", full)


def test_nothing_to_show_is_shown(tmp_path):
    torch.save({"bias": torch.zeros(3)}, tmp_path / "m.pt")
    assert "0 weights, 3 parameters" in printed(analyze_record(lrconvert.analyze(tmp_path / "m.pt")))


def test_a_record_without_a_table_is_a_bug():
    with pytest.raises(TypeError, match="no table for Record"):
        printed(Record(command="x"))

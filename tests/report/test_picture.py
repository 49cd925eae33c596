"""The picture of a sweep: a panel for each cost, a curve for each allocator, points where their numbers say."""

import sys

import pytest
from PIL import Image

from lrconvert.budget import ALLOCATORS
from lrconvert.errors import OutputExistsError, UsageError
from lrconvert.report.picture import check_picture, picture, save_picture
from lrconvert.report.record_sweep import SweepPoint, SweepRecord


def record(*points, macs=None, **changes):
    settings = {
        "source": "a & b <c>",
        "model": None,
        "by": "params",
        "calibrated": False,
        "held_out": None,
        "validation": None,
        "num_params": 1000,
        "macs": macs,
        "accuracy": None,
        "latency_note": None,
        "notes": (),
    }
    return SweepRecord(**{**settings, **changes}, points=points)


def point(params, error, allocator="uniform", **more):
    known = {"macs": None, "low_rank": 1, "error_predicted": error, **more}
    return SweepPoint(allocator=allocator, ratio=0.5, plan_ratio=0.5, num_params=params, **known)


def curves(figure):
    """(panel, label) to the points of its curve; a line all the way across has its height alone."""
    return {
        (axes.get_xlabel().partition(",")[0], line.get_label()): (
            list(line.get_ydata())[:1] if line.get_label() == "dense" else list(zip(*line.get_data(), strict=True))
        )
        for axes in figure.axes
        for line in axes.get_lines()
    }


def test_curves_go_through_the_points_of_each_allocator():
    made = record(
        point(800, 0.1, macs=6),
        point(500, 0.3, macs=4),
        point(700, 0.2, "other", macs=3, latency_ms=1.0, latency_dense_ms=2.0),
        macs=8,
    )
    assert curves(picture(made)) == {
        ("parameters", "uniform"): [(0.8, 0.1), (0.5, 0.3)],
        ("parameters", "other"): [(0.7, 0.2)],
        ("MACs", "uniform"): [(0.75, 0.1), (0.5, 0.3)],
        ("MACs", "other"): [(0.375, 0.2)],
    }


def test_a_measured_latency_has_a_panel():
    made = record(point(500, 0.2, latency_ms=1.0, latency_dense_ms=4.0))
    assert curves(picture(made))["latency", "uniform"] == [(0.25, 0.2)]


@pytest.mark.parametrize("error", [float("nan"), float("inf"), None])
def test_a_loss_that_is_not_known_is_not_drawn(error):
    made = record(point(500, error), point(400, 0.5))
    assert curves(picture(made)) == {("parameters", "uniform"): [(0.4, 0.5)]}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "error of the weights, predicted"),
        ({"calibrated": True}, "error of the output, predicted"),
        ({"calibrated": True, "held_out": 9}, "error of the output, measured"),
        ({"held_out": 9, "validation": "digits", "accuracy": 0.9}, "accuracy on digits"),
    ],
)
def test_the_axes_say_what_is_lost(changes, name):
    made = record(point(500, 0.2, error_measured=0.3, accuracy=0.8), **changes)
    figure = picture(made)
    assert [axes.get_ylabel() for axes in figure.axes] == [name]
    height = {"measured": 0.3, "predicted": 0.2, "digits": 0.8}[name.rpartition(" ")[2]]
    drawn = curves(figure)
    assert drawn["parameters", "uniform"] == [(0.5, height)]
    assert drawn.get(("parameters", "dense")) == ([0.9] if "accuracy" in changes else None)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == (["uniform", "dense"] if "accuracy" in changes else ["uniform"])


def test_the_suffix_says_the_format_and_nothing_is_overwritten(tmp_path):
    made = record(point(500, 0.2), point(300, 0.4))
    save_picture(made, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<svg" in text
    save_picture(made, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    save_picture(made, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 600
    with pytest.raises(OutputExistsError):
        save_picture(made, tmp_path / "a.svg")
    save_picture(record(point(300, 0.4)), tmp_path / "a.svg", overwrite=True)
    assert (tmp_path / "a.svg").read_text() != text


@pytest.mark.parametrize("macs", [None, 8])
def test_the_names_of_all_allocators_are_inside(macs):
    points = [point(500, 0.2, name, macs=macs, accuracy=0.5) for name in ALLOCATORS]
    figure = picture(record(*points, macs=macs, validation="fashion-mnist", accuracy=0.9))
    figure.draw_without_rendering()
    names, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert names.x0 >= 0
    assert names.x1 <= whole.x1
    assert names.y0 >= 0
    assert names.y1 <= figure.axes[0].get_window_extent().y0


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    save_picture(record(point(500, 0.2), source="a$_b$^c & <d>"), tmp_path / "a.png")


def test_what_cannot_be_drawn_is_told_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"a\.jpg: pictures are \.svg, \.png or \.pdf files"):
        check_picture(tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'lrconvert\[plot\]'"):
        check_picture(tmp_path / "a.svg")

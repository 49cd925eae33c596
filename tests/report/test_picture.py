"""The picture of a sweep: well-formed, everything inside, and every point where its numbers say."""

from xml.etree import ElementTree

import pytest

from lrconvert.errors import OutputExistsError, UsageError
from lrconvert.report.picture import picture, save_picture
from lrconvert.report.record_sweep import SweepPoint, SweepRecord

SPACE = "{http://www.w3.org/2000/svg}"


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


def dots(text):
    """(x, y) of the dots, those of the legend last."""
    root = ElementTree.fromstring(text)
    return [(float(each.get("cx")), float(each.get("cy"))) for each in root.iter(f"{SPACE}circle")]


def ticks(text, anchor):
    """Position by value of the numbers along an axis: across for "middle", down for "end"."""
    root = ElementTree.fromstring(text)
    which = "x" if anchor == "middle" else "y"
    numbers = {}
    for each in root.iter(f"{SPACE}text"):
        if each.get("text-anchor") == anchor and each.text.replace(".", "").isdecimal():
            numbers[float(each.text)] = float(each.get(which)) - (4 if which == "y" else 0)
    return numbers


def test_points_are_where_the_axes_say():
    text = picture(record(point(800, 0.1), point(500, 0.3), point(200, 0.62)))
    across, down = ticks(text, "middle"), ticks(text, "end")
    *drawn, _ = dots(text)
    for (x, y), (share, error) in zip(drawn, [(0.8, 0.1), (0.5, 0.3), (0.2, 0.62)], strict=True):
        for place, value, axis in ((x, share, across), (y, error, down)):
            first, last = min(axis), max(axis)
            want = axis[first] + (value - first) / (last - first) * (axis[last] - axis[first])
            assert place == pytest.approx(want, abs=0.1)
    assert 4 <= len(across) <= 9
    assert 4 <= len(down) <= 9


@pytest.mark.parametrize(
    ("made", "panels", "drawn"),
    [
        (record(point(500, 0.2)), 1, 1),
        (record(point(500, 0.0), point(500, 0.0)), 1, 2),
        (record(point(500, float("nan")), point(400, 0.5), point(300, None)), 1, 1),
        (record(point(500, None)), 1, 0),
        (record(point(500, 0.2, macs=7), point(400, 0.3, "other", macs=5), macs=9), 2, 4),
        (record(point(500, 0.2, macs=7, latency_ms=1.0, latency_dense_ms=2.0), macs=9), 3, 3),
        (record(point(500, 0.2, accuracy=0.9), validation="digits", accuracy=0.95), 1, 1),
    ],
)
def test_whatever_is_known_is_drawn_inside(made, panels, drawn):
    text = picture(made)
    root = ElementTree.fromstring(text)
    width, height = float(root.get("width")), float(root.get("height"))
    names = {each.allocator for each in made.points}
    assert len(dots(text)) == drawn + len(names)
    assert (
        sum(each.text.endswith("of dense") or "of dense (" in each.text for each in root.iter(f"{SPACE}text")) == panels
    )
    for x, y in dots(text):
        assert 0 < x < width
        assert 0 < y < height
    assert any(each.text == "a & b <c>" for each in root.iter(f"{SPACE}text"))


def test_files_stand_alone_and_are_not_overwritten(tmp_path):
    made = record(point(500, 0.2))
    save_picture(made, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == picture(made)
    save_picture(made, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert picture(made) in page
    assert "src=" not in page
    with pytest.raises(OutputExistsError):
        save_picture(made, tmp_path / "a.svg")
    save_picture(made, tmp_path / "a.svg", overwrite=True)
    with pytest.raises(UsageError, match=r"a\.png: pictures are \.svg or \.html files"):
        save_picture(made, tmp_path / "a.png")

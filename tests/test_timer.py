"""Timing in turns, by a clock that only the jobs move."""

import pytest

import lrconvert.timer
from lrconvert.timer import Latency, latencies, times_in_turns


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for the jobs that move it: a list of one number, seconds."""
    now = [0.0]
    monkeypatch.setattr(lrconvert.timer.time, "perf_counter", lambda: now[0])
    return now


def job(clock, seconds, log=None):
    rest = iter(seconds)

    def run():
        clock[0] += next(rest)
        if log is not None:
            log[0].append(log[1])

    return run


def test_jobs_take_turns_and_the_first_turn_does_not_count(clock):
    log = []
    jobs = [job(clock, [9, 0.001, 0.002], (log, "a")), job(clock, [9, 0.003, 0.004], (log, "b"))]
    assert times_in_turns(jobs, 2) == [pytest.approx([1, 2]), pytest.approx([3, 4])]
    assert log == ["a", "b"] * 3


def test_slow_jobs_get_fewer_turns_but_some(clock):
    assert times_in_turns([job(clock, [1.0] * 9)], 8, seconds=5) == [pytest.approx([1000] * 5)]
    assert times_in_turns([job(clock, [1.0] * 9)], 8, seconds=0) == [pytest.approx([1000] * 3)]
    assert times_in_turns([job(clock, [1.0] * 9)], 8, seconds=0, least=1) == [pytest.approx([1000])]


def test_a_latency_is_the_median_and_the_quartiles_of_its_own_turns(clock):
    log = []
    jobs = [job(clock, [9, 9, 0.004, 0.001, 0.003, 0.002], (log, "a")), job(clock, [9, 9, *[0.005] * 4], (log, "b"))]
    one, two = latencies(jobs, n=4, warm_up=2)
    assert log == ["a", "b"] * 6
    assert (one.median_ms, one.low_ms, one.high_ms) == pytest.approx((2.5, 1.25, 3.75))
    assert two == Latency(*[pytest.approx(5.0)] * 3, 4)


def test_one_turn_is_its_own_median(clock):
    assert latencies([job(clock, [9, 0.25])], n=1, warm_up=1) == [Latency(250.0, 250.0, 250.0, 1)]

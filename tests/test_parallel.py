"""Work on many layers: every result once, errors come out, and thread settings stay as they were."""

import threading

import pytest
import torch

from lrconvert.parallel import map_layers

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [[], [1], [3, 1, 2] * 10, [1 << 23, 5, 1 << 23, 7]])
def test_every_item_is_done_once(sizes):
    items = list(enumerate(sizes))
    done = dict(map_layers(lambda item: item[1] * 2, items, size=lambda item: item[1], device=CPU))
    assert done == {item: item[1] * 2 for item in items}


def test_large_items_run_alone_on_the_callers_thread_and_small_ones_do_not():
    ran = {}
    sizes = [1 << 23, 1, 2, 3]
    list(map_layers(lambda size: ran.setdefault(size, threading.current_thread()), sizes, size=int, device=CPU))
    assert ran[1 << 23] is threading.current_thread()
    if torch.get_num_threads() > 1:
        assert all(ran[size] is not threading.current_thread() for size in (1, 2, 3))


def test_an_error_comes_out_and_the_rest_is_not_waited_for():
    started = []

    def job(number):
        started.append(number)
        if number == 99:
            raise ValueError("99 is bad")

    with pytest.raises(ValueError, match="99 is bad"):
        list(map_layers(job, range(100), size=int, device=CPU))
    assert len(started) < 50


def test_no_more_results_than_workers_wait_in_memory():
    finished = []
    results = map_layers(finished.append, range(100), size=int, device=CPU)
    next(results)
    assert len(finished) <= 2 * torch.get_num_threads() + 2
    results.close()


def test_thread_settings_are_kept():
    before = torch.get_num_threads()
    list(map_layers(lambda _: torch.get_num_threads(), range(10), size=int, device=CPU))
    assert torch.get_num_threads() == before

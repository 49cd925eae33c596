"""Running the same numeric job over many layers, with the cores shared in the way that suits their size."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

# From here on BLAS uses all cores well by itself, and one matrix at a time keeps memory near the largest tensor.
_LARGE = 1 << 22


def map_layers(
    job: Callable[[Item], Result], items: Iterable[Item], *, size: Callable[[Item], int], device: torch.device
) -> Iterator[tuple[Item, Result]]:
    """(item, job(item)) for every item, in the order they finish.

    Small matrices run one a core, each on one thread: LAPACK's eigenvalue routines gain little from a second core.
    Matrices of more than 4 million elements, and all work for another device than the CPU, run one at a time.

    Args:
        job: what to do; it must release the GIL, as torch does.
        items: what to do it on.
        size: number of elements of an item.
        device: where the job computes.
    """
    ordered = sorted(items, key=size, reverse=True)
    workers = torch.get_num_threads()
    alone = [item for item in ordered if device.type != "cpu" or workers == 1 or size(item) > _LARGE]
    for item in alone:
        yield item, job(item)
    waiting = iter(ordered[len(alone) :])
    one_thread_each = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    with threadpool_limits(limits=1, user_api="blas"), one_thread_each as pool:
        running: dict[Future[Result], Item] = {}
        try:
            while True:
                # No more in flight than can run: a finished result is handed over before new memory is asked for.
                for item in waiting:
                    running[pool.submit(job, item)] = item
                    if len(running) > workers:
                        break
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            for future in running:
                future.cancel()
            # New threads start with what any thread set last: undo it for them.
            torch.set_num_threads(workers)

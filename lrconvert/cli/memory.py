"""Keeping the process small: freed memory goes back to the system."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_ONE_MEGABYTE = 1 << 20


def return_freed_memory() -> None:
    """Make glibc map every block of a megabyte and more on its own, so that freeing one gives it back at once.

    By default glibc learns to keep freed blocks of up to 32 MB in a heap for each thread. Over a large checkpoint,
    whose tensors are read, factorized and dropped by several threads, those heaps grow by gigabytes that nothing
    uses. It is a setting of the whole process, so only commands that stream checkpoints make it: training, which asks
    for the same blocks again and again, is slower with it. Elsewhere MALLOC_MMAP_THRESHOLD_ does the same.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _ONE_MEGABYTE)

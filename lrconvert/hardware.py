"""What multiple of ranks the hardware likes."""

import torch


def rank_multiple(device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """The multiple that ranks are rounded to for `--rank-multiple auto`: what one instruction takes at once.

    On a CPU, the numbers in a vector register: 16 of float32 with AVX-512, 8 with AVX2, else 4. On a GPU, 16 bytes, or
    8 numbers of 16 bits, from which on tensor cores work without padding (NVIDIA, Matrix Multiplication Background
    User's Guide, section 3); more than 8 never pays there for ranks of some dozens.
    """
    if device.type != "cpu":
        return 8
    widths = {"AVX512": 64, "AVX2": 32}
    return max(1, widths.get(torch.backends.cpu.get_cpu_capability(), 16) // dtype.itemsize)

"""How much faster factorized convolutions run a large batch in parts than all of it at once (lrconvert.layers.parts).

    python benchmarks/parts.py [--json FILE] [--rounds 9] [--models resnet50 …] [--always]

Both ways take turns, on the same factors, float32, in inference: single layers, and torchvision's models at a quarter
of the full rank, beside the dense model. Images are contiguous, as they come; in channels_last nothing runs in parts,
nor where the environment makes malloc keep its memory, but for --always:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 python benchmarks/parts.py --always --models
"""

import argparse
import copy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from common import environment, interleave, ratios, save, spread, summary, table
from torch import nn

import lrconvert
from lrconvert.layers import parts
from lrconvert.layers.conv import LowRankConv
from lrconvert.layers.lowrank import LowRankLayer

# Batch, inputs, rank, outputs, size, kernel, stride: as in ResNets and VGGs, but for the ranks.
LAYERS = (
    (16, 64, 16, 64, 224, 3, 1),
    (16, 64, 48, 64, 224, 3, 1),
    (16, 64, 48, 128, 112, 3, 1),
    (16, 128, 64, 128, 112, 3, 1),
    (32, 128, 100, 256, 56, 3, 1),
    (32, 256, 128, 256, 56, 3, 1),
    (32, 512, 384, 512, 28, 3, 1),
    (32, 64, 45, 256, 56, 1, 1),
    (32, 256, 50, 64, 56, 1, 1),
    (16, 256, 100, 512, 56, 1, 1),
    (64, 256, 160, 512, 28, 1, 1),
    (64, 1024, 200, 256, 14, 1, 1),
    (8, 256, 64, 256, 112, 3, 2),
    (4, 64, 30, 64, 224, 3, 1),
)
MODELS = {"resnet50": (16, 64), "vgg16_bn": (16,), "resnet18": (16, 64)}


def main() -> None:
    """Measure every layer and model, print the ratios, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="*", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--always", action="store_true", help="in parts also where malloc keeps its memory")
    options = parser.parse_args()
    if options.always:
        mock.patch.object(parts, "_gives_back", return_value=True).start()
    rows = [of_layer(*sizes, options.rounds) for sizes in LAYERS]
    rows += [of_model(name, batch, options.rounds) for name in options.models for batch in MODELS[name]]
    print(describe(rows))
    save({"benchmark": "parts", "environment": environment(), "rows": rows}, options.json)


def of_layer(
    batch: int, inputs: int, rank: int, outputs: int, size: int, kernel: int, stride: int, rounds: int
) -> dict[str, Any]:
    """One convolution."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)).eval()
    low_rank = lrconvert.factorize(copy.deepcopy(dense), f"rank={rank}", keep_first=0, keep_last=False)
    name = f"{inputs}→{rank}→{outputs}, {size}², kernel {kernel}" + (f", stride {stride}" if stride > 1 else "")
    return measure(name, dense, low_rank, torch.randn(batch, inputs, size, size), rounds)


def of_model(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """One of torchvision's models."""
    torch.manual_seed(0)
    dense = torchvision.models.get_model(name, weights=None).eval()
    low_rank = lrconvert.factorize(copy.deepcopy(dense), "rank_ratio=0.25")
    return measure(name, dense, low_rank, torch.randn(batch, 3, 224, 224), rounds)


def measure(name: str, dense: nn.Module, low_rank: Any, x: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Times of the dense layer or model, and of the factorized one in both ways."""

    def at_once() -> None:
        with mock.patch.object(LowRankConv, "forward", LowRankLayer.forward):
            low_rank(x)

    jobs = {"dense": lambda: dense(x), "at once": at_once, "in parts": lambda: low_rank(x)}
    with torch.inference_mode():
        seconds = interleave(jobs, dict.fromkeys(jobs, rounds))
    return {
        "name": name,
        "batch": len(x),
        "seconds": {job: summary(values) for job, values in seconds.items()},
        "over_at_once": ratios(seconds["at once"], seconds["in parts"]),
        "over_dense": ratios(seconds["dense"], seconds["in parts"]),
    }


def describe(rows: list[dict[str, Any]]) -> str:
    """All cases as text."""
    lines = [
        [
            f"{row['name']}, batch {row['batch']}",
            *(f"{row['seconds'][job]['median'] * 1e3:.0f} ms" for job in ("dense", "at once", "in parts")),
            spread(row["over_at_once"], "×"),
            spread(row["over_dense"], "×"),
        ]
        for row in rows
    ]
    return "\n" + table(["", "dense", "at once", "in parts", "than at once", "than dense"], lines)


if __name__ == "__main__":
    main()

"""What pivoted factors cost in time: torchvision models, dense, with plain and with pivoted factors, in turns.

    python benchmarks/pivoted.py [--json FILE] [--rounds 9] [--models vit_b_16 …] [--batches 1 16] [--rank-ratio 0.4]
        [--param-ratio R]

All layers have the same rank ratio, below 0.5 so that they shrink in either form, and both factorized networks compute
the same. Pivoted factors hold r² numbers less in linear layers, attention and convolutions of kernel 1. With
--param-ratio both have the same size instead, and the pivoted one higher ranks. Weights are random; float32,
channels_last, one process.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from common import build_model, environment, interleave, ratios, save, spread, summary, table
from torch import nn

import lrconvert

MODELS = ("vit_b_16", "resnet50", "convnext_tiny")


def main() -> None:
    """Measure every case, print the speed-ups, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--rank-ratio", type=float, default=0.4)
    parser.add_argument("--param-ratio", type=float, help="one size, instead of one rank ratio")
    options = parser.parse_args()
    chosen: dict[str, Any] = {"rule": f"rank_ratio={options.rank_ratio}"}
    if options.param_ratio is not None:
        chosen = {"param_ratio": options.param_ratio}
    rows = []
    for name in options.models:
        models = variants(build_model(name, "random"), chosen)
        for batch in options.batches:
            rows.append({"model": name, "batch": batch, **measure(models, batch, options.rounds)})
            print(f"{name}, batch {batch}", flush=True)
    print(describe(rows))
    save({"benchmark": "pivoted", **chosen, "environment": environment(), "rows": rows}, options.json)


def variants(model: nn.Module, chosen: dict[str, Any]) -> dict[str, nn.Module]:
    """The model, and its two factorized forms."""
    models = {"dense": model}
    for name, pivoted in (("plain", False), ("pivoted", True)):
        plan = lrconvert.make_plan(model, pivoted=pivoted, input_shape=(3, 224, 224), device="cpu", **chosen)
        models[name] = lrconvert.factorize(copy.deepcopy(model), plan, device="cpu")
    return {name: each.to(memory_format=torch.channels_last) for name, each in models.items()}


def measure(models: dict[str, nn.Module], batch: int, rounds: int) -> dict[str, Any]:
    """Times of one batch, and what they come to."""
    image = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    jobs = {name: (lambda model=model: model(image)) for name, model in models.items()}
    with torch.inference_mode():
        seconds = interleave(jobs, dict.fromkeys(jobs, rounds))
        outputs = {name: job() for name, job in jobs.items()}
    difference = (outputs["plain"] - outputs["pivoted"]).norm() / outputs["plain"].norm()
    params = {name: sum(each.numel() for each in model.parameters()) for name, model in models.items()}
    return {
        "parameters": params,
        "difference": float(difference),
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "speedup": {name: ratios(seconds["dense"], seconds[name]) for name in ("plain", "pivoted")},
        "pivoted_over_plain": ratios(seconds["plain"], seconds["pivoted"]),
    }


def describe(rows: list[dict[str, Any]]) -> str:
    """All cases as text."""
    lines = []
    for row in rows:
        dense = row["parameters"]["dense"]
        lines.append(
            [
                f"{row['model']} batch {row['batch']}",
                *(f"{row['parameters'][name] / dense:.3f}" for name in ("plain", "pivoted")),
                *(spread(row["speedup"][name], "×") for name in ("plain", "pivoted")),
                spread(row["pivoted_over_plain"], "×"),
            ]
        )
    header = ["", "params, plain", "pivoted", "speed, plain", "pivoted", "plain time / pivoted time"]
    return table(header, lines)


if __name__ == "__main__":
    main()

"""How much faster a network runs once it is factorized for speed: torchvision models, dense and low rank, in turns.

    python benchmarks/auto_speed.py [--json FILE] [--rounds 9] [--models vgg16_bn …] [--batches 1 16] [--contiguous]
    python benchmarks/auto_speed.py --onnx [--json FILE] [--rounds 9] [--models vgg16_bn …] [--batches 1 16]

Two plans for each model and batch: `--auto --for speed`, and half of the MACs, `--mac-ratio 0.5 --for speed`. They are
made for the device, input size and batch that are measured then. Dense and low rank are in one process, float32, both
channels_last or, with --contiguous, both as they are built, and take turns. With --onnx models are exported first, and
the graphs are factorized and run in onnxruntime.

The weights are random, but ranks depend on spectra, and those of random weights are flat: the i-th singular value of
every weight is therefore made proportional to i^-½. Those of trained networks fall off as fast or faster. Accuracy is
not measured here.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from common import environment, interleave, ratios, save, spread, summary, table, verdict
from torch import nn

import lrconvert
from lrconvert.cost import trace
from lrconvert.inputs import one_input
from lrconvert.plan import Plan

IMAGE = one_input((3, 224, 224))
MODELS = ("resnet50", "vgg16_bn", "vit_b_16")
PLANS: dict[str, dict[str, Any]] = {"--auto": {"rule": "auto"}, "--mac-ratio 0.5": {"mac_ratio": 0.5}}
# Least speed-up wanted; a model is never to be slower.
TARGETS = {("vgg16_bn", "--mac-ratio 0.5"): 1.6, ("vit_b_16", "--mac-ratio 0.5"): 1.5}


def main() -> None:
    """Measure every case, print the speed-ups, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--contiguous", action="store_true", help="not channels_last")
    parser.add_argument("--onnx", action="store_true", help="graphs in onnxruntime")
    options = parser.parse_args()
    layout = torch.contiguous_format if options.contiguous else torch.channels_last
    rows = []
    for name in options.models:
        model = model_of(name)
        with tempfile.TemporaryDirectory() as folder:
            path = exported(name, model, Path(folder)) if options.onnx else None
            for batch in options.batches:
                for plan in PLANS:
                    if path is not None:
                        found = {"runner": "onnxruntime", **measure_graph(path, batch, plan, options.rounds)}
                    else:
                        found = {"layout": str(layout), **measure(model, batch, plan, layout, options.rounds)}
                    rows.append({"model": name, "batch": batch, "plan": plan, **found})
                    print(f"{name}, batch {batch}, {plan}", flush=True)
    print(describe(rows))
    save({"benchmark": "auto_speed", "environment": environment("onnxruntime"), "rows": rows}, options.json)


def model_of(name: str) -> nn.Module:
    """A torchvision model whose weights have singular values that fall off as i^-½."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval().requires_grad_(False)
    for weight in (parameter for parameter in model.parameters() if parameter.dim() > 1):
        rows, columns = weight.flatten(1).shape
        rank = min(rows, columns)
        left, right = (torch.linalg.qr(torch.randn(size, rank)).Q for size in (rows, columns))
        values = torch.arange(1, rank + 1) ** -0.5
        values *= rows**0.5 / values.norm()  # outputs of the size of the inputs
        weight.copy_(((left * values) @ right.T).reshape(weight.shape))
    return model


def exported(name: str, model: nn.Module, folder: Path) -> Path:
    """The graph of a model."""
    torch.save(model.state_dict(), folder / "dense.pt")
    lrconvert.export(folder / "dense.pt", folder / "dense.onnx", "onnx", model=f"torchvision/{name}")
    return folder / "dense.onnx"


def measure_graph(path: Path, batch: int, plan: str, rounds: int) -> dict[str, Any]:
    """Times and ratios for one graph, batch and plan."""
    import onnxruntime

    started = time.perf_counter()
    found = lrconvert.make_plan(path, **PLANS[plan], goal="speed", rank_multiple="auto", batch_size=batch, device="cpu")
    planning = time.perf_counter() - started
    small = path.with_name("small.onnx")
    record = lrconvert.factorize(path, found, output=small, overwrite=True)
    image = torch.randn(batch, 3, 224, 224).numpy()
    sessions = [onnxruntime.InferenceSession(str(each), providers=["CPUExecutionProvider"]) for each in (path, small)]
    name = sessions[0].get_inputs()[0].name
    jobs = {
        which: lambda session=session: session.run(None, {name: image})
        for which, session in zip(("dense", "low rank"), sessions, strict=True)
    }
    seconds = interleave(jobs, dict.fromkeys(jobs, rounds))
    assert record.macs_before
    assert record.macs_after
    return {**figures(found, planning, seconds), "mac_ratio": record.macs_after / record.macs_before}


def measure(model: nn.Module, batch: int, plan: str, layout: torch.memory_format, rounds: int) -> dict[str, Any]:
    """Times and ratios for one model, batch, plan and layout of images and weights."""
    started = time.perf_counter()
    found = lrconvert.make_plan(
        model,
        **PLANS[plan],
        goal="speed",
        rank_multiple="auto",
        batch_size=batch,
        channels_last=layout == torch.channels_last,
        input_shape=(3, 224, 224),
        device="cpu",
    )
    planning = time.perf_counter() - started
    image = torch.randn(batch, 3, 224, 224).contiguous(memory_format=layout)
    low_rank = lrconvert.factorize(copy.deepcopy(model), found, device="cpu")
    dense, low_rank = (each.to(memory_format=layout) for each in (copy.deepcopy(model), low_rank))
    jobs = {"dense": lambda: dense(image), "low rank": lambda: low_rank(image)}
    with torch.inference_mode():
        seconds = interleave(jobs, dict.fromkeys(jobs, rounds))
    return {
        **figures(found, planning, seconds),
        "mac_ratio": trace(low_rank, IMAGE).macs / trace(model, IMAGE).macs,
    }


def figures(found: Plan, planning: float, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """What is noted of a plan, of the seconds it took to make, and of those that both networks took."""
    assert found.latency is not None
    return {
        "planning_seconds": planning,
        "low_rank_layers": len(found.low_rank),
        "layers": len(found.layers),
        "predicted_ratio": found.latency.predicted_ms / found.latency.dense_ms,
        "measured_ratio": found.latency.ratio,
        "seconds": {job: summary(values) for job, values in seconds.items()},
        "speedup": ratios(seconds["dense"], seconds["low rank"]),
    }


def describe(rows: list[dict[str, Any]]) -> str:
    """All cases as text."""
    lines = []
    for row in rows:
        times = row["seconds"]
        fastest = times["dense"]["min"] / times["low rank"]["min"]
        target = TARGETS.get((row["model"], row["plan"]), 1)
        lines.append(
            [
                f"{row['model']} batch {row['batch']} {row['plan']}",
                f"{row['low_rank_layers']}/{row['layers']}",
                f"{row['mac_ratio']:.2f}",
                f"{times['dense']['median'] * 1e3:.0f} ms",
                spread(row["speedup"], "×"),
                f"{1 / row['predicted_ratio']:.2f}×",
                f"{row['planning_seconds']:.0f} s",
                verdict(row["speedup"]["median"], fastest, target),
            ]
        )
    return "\n" + table(["", "layers", "MACs", "dense", "times as fast", "predicted", "planning", ""], lines)


if __name__ == "__main__":
    main()

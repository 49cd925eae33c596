"""What calibration adds to the forward passes that it needs, and how long allocation takes afterwards.

    python benchmarks/calibrate.py [--images 256] [--rounds 3] [--models resnet50 …] [--json FILE]

torchvision models with random weights on random images of 3×224×224, in batches of 32. A forward pass over all images
and a calibration on them take turns; what calibration adds is its time less that of the forward pass before it, as a
multiple of that. Eigenvalues are computed when somebody asks for them, and are timed on their own; so is a plan for
half of the parameters, with and without calibration, once the spectra are there.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import build_model, environment, save, spread, summary, table

import lrconvert
from lrconvert.inputs import Call

MODELS = ("resnet50", "vit_b_16")
# Most that calibration may add, in forward passes.
MOST_ADDED = 2


def main() -> None:
    """Measure every model, print the ratios, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    options = parser.parse_args()
    rows = [{"model": name, **measure(name, options.images, options.rounds)} for name in options.models]
    lines = [
        [
            row["model"],
            f"{row['forward_seconds']['median']:.1f} s",
            spread(row["added"], "×"),
            f"{row['eigenvalues_seconds']:.1f} s",
            f"{row['plan_seconds']['calibrated']:.2f} s",
            f"{row['plan_seconds']['weights']:.2f} s",
            "reached" if row["added"]["median"] <= MOST_ADDED else "MISSED",
        ]
        for row in rows
    ]
    header = ["", "forward", "added", "eigenvalues", "plan", "plan, weights", f"target ≤{MOST_ADDED}×"]
    print("\n" + table(header, lines))
    record = {"benchmark": "calibrate", "images": options.images, "environment": environment(), "rows": rows}
    save(record, options.json)


def measure(name: str, images: int, rounds: int) -> dict[str, Any]:
    """Times of one model."""
    model = build_model(name, "random")
    calls = [Call((torch.randn(32, 3, 224, 224),), {}, 32) for _ in range(images // 32)]

    def forward() -> None:
        with torch.no_grad():
            for call in calls:
                call.run(model)

    calls[0].run(model)
    forwards, calibrations = [], []
    for _ in range(rounds):
        forwards.append(seconds(forward)[0])
        taken, calibration = seconds(lambda: lrconvert.calibrate(model, calls, input_shape=(3, 224, 224)))
        calibrations.append(taken)
        print(f"{name}: forward {forwards[-1]:.1f} s, calibration {taken:.1f} s", flush=True)
    eigenvalues, _ = seconds(calibration.curves)
    analysis = lrconvert.analyze(model, input_shape=(3, 224, 224))
    plans = {
        which: seconds(lambda known=known: lrconvert.make_plan(analysis, param_ratio=0.5, calibration=known))[0]
        for which, known in (("calibrated", calibration), ("weights", None))
    }
    return {
        "forward_seconds": summary(forwards),
        "calibration_seconds": summary(calibrations),
        "added": summary([after / before - 1 for before, after in zip(forwards, calibrations, strict=True)]),
        "eigenvalues_seconds": eigenvalues,
        "plan_seconds": plans,
    }


def seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    """How long `job` took, and what it returned."""
    started = time.perf_counter()
    result = job()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()

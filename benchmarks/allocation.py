"""A trained network made smaller: accuracy against size, by what the factors minimise and how ranks are allocated.

    python benchmarks/allocation.py DENSE.safetensors --dataset fashion-mnist --data-dir DIR [--by macs|params]
        [--ratios 0.7,0.5,0.35,0.25] [--no-finetune] [--json FILE] [KEY=VALUE …]

Every method is evaluated on the test images as it is, and after one epoch of fine-tuning with distillation from the
dense network; KEY=VALUE go to `lrconvert finetune`. Calibration takes 512 training images, without labels.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import common

import lrconvert
from lrconvert.errors import NothingToCompressError
from lrconvert.training.data import open_dataset
from lrconvert.training.evaluation import accuracy_of

# Name to (whether examples are used, allocator, whether layers are then fitted in turn).
METHODS = {
    "weights, uniform": (False, "uniform", False),
    "weights, absolute_error": (False, "absolute_error", False),
    "weights, relative_error": (False, "relative_error", False),
    "weights, stable_rank": (False, "stable_rank", False),
    "data-aware, uniform": (True, "uniform", False),
    "data-aware, stable_rank": (True, "stable_rank", False),
    "data-aware, output_error": (True, "output_error", False),
    "data-aware, sensitivity": (True, "sensitivity", False),
    "data-aware, output_error, sequential": (True, "output_error", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--by", choices=["macs", "params"], default="params")
    parser.add_argument("--ratios", default="0.7,0.5,0.35,0.25")
    parser.add_argument("--no-finetune", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args()
    ratios = [float(text) for text in options.ratios.split(",")]
    data = open_dataset(options.dataset, data_dir=options.data_dir, download=False)
    assert data.test is not None
    dense = accuracy_of(lrconvert.load(options.checkpoint), data.test)
    print(f"dense: {dense:.2%}", flush=True)
    started = time.perf_counter()
    calibration = lrconvert.calibrate(
        options.checkpoint, options.dataset, data_dir=options.data_dir, count=512, measure=True
    )
    seconds = time.perf_counter() - started
    results: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ratio in ratios:
            for name, (aware, allocator, sequential) in METHODS.items():
                file = Path(folder) / "small.safetensors"
                try:
                    record = lrconvert.factorize(
                        options.checkpoint,
                        output=file,
                        overwrite=True,
                        allocator=allocator,
                        calibration=calibration if aware else None,
                        sequential=sequential,
                        **{"mac_ratio" if options.by == "macs" else "param_ratio": ratio},
                    )
                except NothingToCompressError as error:
                    print(f"{name} {ratio:g}: {error}", flush=True)
                    continue
                found = {
                    "params": record.num_params_after / record.num_params_before,
                    "macs": (record.macs_after or 0) / (record.macs_before or 1),
                    "accuracy": accuracy_of(lrconvert.load(file), data.test),
                }
                if not options.no_finetune:
                    tuned = lrconvert.finetune(
                        file,
                        Path(folder) / "tuned",
                        overrides=options.overrides,
                        overwrite=True,
                        dataset=options.dataset,
                        data_dir=options.data_dir,
                        download=False,
                        teacher=options.checkpoint,
                        epochs=1,
                    )
                    found |= {"tuned": tuned.test_accuracy, "tuned_seconds": tuned.seconds}
                results.setdefault(name, {})[f"{ratio:g}"] = found
                print(f"{name} {ratio:g}: {found}", flush=True)
    header = [f"dense {dense:.2%}", *(f"{ratio:g}" for ratio in ratios)]
    rows = [[name, *(cell(each.get(f"{ratio:g}")) for ratio in ratios)] for name, each in results.items()]
    print("\n" + common.table(header, rows))
    print(f"\naccuracy without training → after one epoch; ratios of {options.by}; one run each")
    record = {
        "environment": common.environment("accelerate"),
        "checkpoint_accuracy": dense,
        "by": options.by,
        "overrides": options.overrides,
        "calibration_seconds": seconds,
        "results": results,
    }
    common.save(record, options.json)


def cell(found: dict[str, Any] | None) -> str:
    """Accuracies of one method at one ratio."""
    if found is None:
        return "not reached"
    return f"{found['accuracy']:.2%}" + (f" → {found['tuned']:.2%}" if "tuned" in found else "")


if __name__ == "__main__":
    main()

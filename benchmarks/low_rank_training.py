"""Dense, Pufferfish, Cuttlefish and SI&FD on Fashion-MNIST, several seeds each: size, accuracy and end-to-end time.

    python benchmarks/low_rank_training.py --data-dir DIR [--seeds 3] [--json FILE] [--runs FOLDER] [KEY=VALUE …]

Runs the recipes `fashion-mnist/resnet18-*` one after the other, each in a process of its own, all methods of a seed in
turn, so that a change in the machine's speed meets them all. Runs that are finished in FOLDER are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

METHODS = ("dense", "pufferfish", "cuttlefish", "sifd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields that overrule all four recipes")
    parser.add_argument("--data-dir", default="data", help="where Fashion-MNIST lies")
    parser.add_argument("--recipes", default="fashion-mnist/resnet18", help="name of the four, without -METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, help="folder to keep the runs in")
    parser.add_argument("--json", type=Path, help="write the record here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.runs or Path(temporary)
        reports: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for seed in range(options.seeds):
            for method in METHODS:
                settings = [f"data_dir={options.data_dir}", f"seed={seed}", *options.overrides]
                report = run(f"{options.recipes}-{method}", folder / f"{method}-{seed}", settings)
                reports[method].append(report)
                print(f"{method} {seed}: {report['test_accuracy']:.2%}, {report['seconds']:.0f} s", flush=True)
    rows = {method: row(reports[method], reports["dense"]) for method in METHODS}
    print(
        "\n" + common.table(["", *next(iter(rows.values()))], [[name, *cells.values()] for name, cells in rows.items()])
    )
    print(
        "\naccuracy: on test images, mean ± standard deviation; time: end to end, mean; ×: dense time / time, by seed"
    )
    record = {
        "environment": common.environment("accelerate"),
        "recipes": options.recipes,
        "overrides": options.overrides,
        "seeds": options.seeds,
        "table": rows,
        "runs": {method: [brief(report) for report in each] for method, each in reports.items()},
    }
    common.save(record, options.json)


def run(recipe: str, folder: Path, settings: list[str]) -> dict[str, Any]:
    """The report of a run in `folder`, made now unless it is there."""
    report = folder / "report.json"
    if not report.exists():
        resume = ["--resume"] if (folder / "recipe.yaml").exists() else []
        command = [sys.executable, "-m", "lrconvert", "train", recipe, *settings, "-o", str(folder), "-q", *resume]
        subprocess.run(command, check=True)
    return json.loads(report.read_text(encoding="utf-8"))


def row(reports: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, str]:
    """One line of the table."""
    accuracies = [100 * report["test_accuracy"] for report in reports]
    ratios = [other["seconds"] / report["seconds"] for other, report in zip(dense, reports, strict=True)]
    size = statistics.mean(report["num_params_after"] for report in reports)
    macs = statistics.mean(report["macs_after"] for report in reports)
    return {
        "parameters": f"{size:,.0f} ({size / dense[0]['num_params_after']:.1%})",
        "MACs": f"{macs / 1e6:.1f} M ({macs / dense[0]['macs_after']:.1%})",
        "accuracy": f"{statistics.mean(accuracies):.2f} ± {deviation(accuracies):.2f}",
        "time": f"{statistics.mean(report['seconds'] for report in reports):.0f} s",
        "×": f"{statistics.mean(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
        "full rank": f"{statistics.mean(report['full_rank']['seconds'] for report in reports):.0f} s",
        "low rank": f"{statistics.mean(report['low_rank']['seconds'] for report in reports):.0f} s",
        "E": " ".join(str(report["switch_epoch"]) for report in reports),
        "K": " ".join(str(report["keep_first"]) for report in reports),
    }


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def brief(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run: everything but the layers that stayed dense and what the environment says."""
    ranks = {layer["name"]: layer["rank"] for layer in report["layers"] if layer["rank"] is not None}
    left = {key: value for key, value in report.items() if key not in ("layers", "output", "schema_version")}
    return {**left, "ranks": ranks}


if __name__ == "__main__":
    main()

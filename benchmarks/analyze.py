"""How long the spectra of a whole network take, against two other ways to get them.

    python benchmarks/analyze.py [--json FILE] [--rounds 9] [--peer-rounds 3] [--models resnet50]

Timed in one process, in turns: `lrconvert.analyze` on the live model; a loop of `torch.linalg.svdvals` over the same
matrices; and WeightWatcher's `analyze()` with its own defaults (it cuts a convolution into one matrix for each kernel
element, fits a power law to the spectrum, and skips parameters that are not the weight of a linear or convolution
layer; "layers" says how many each of us looked at). Weights are random, seeded, or, in the rows called "decaying",
have their i-th singular value divided by i.

Speed is not bought with accuracy: the last column is the largest deviation of any singular value from
`svdvals` in float64, relative to the largest singular value of its matrix.
"""

import argparse
import contextlib
import io
import itertools
from pathlib import Path
from typing import Any

import torch
from common import build_model, environment, interleave, ratios, save, spread, summary, table, use_peer, verdict
from torch import nn

import lrconvert

MODELS, SPECTRA = ("resnet50", "vit_b_16"), ("random", "decaying")
SVDVALS_TARGET, WEIGHTWATCHER_TARGET = 5, 20
WEIGHTWATCHER = (
    "weightwatcher==0.7.7",
    "powerlaw==2.0.0",
    "pandas==3.1.1",
    "python-dateutil==2.9.0.post0",
    "six==1.17.0",
    "matplotlib==3.11.2",
    "matplotlib-inline==0.2.2",
    "contourpy==1.3.3",
    "cycler==0.12.1",
    "fonttools==4.68.0",
    "kiwisolver==1.5.1",
    "pyparsing==3.3.3",
    "scipy==1.17.1",
    "scikit-learn==1.9.1",
    "joblib==1.6.0",
    "threadpoolctl==3.8.0",
    "narwhals==2.29.0",
    "tqdm==4.70.1",
)


def main() -> None:
    """Measure every case, print the ratios, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--rounds", type=int, default=9, help="rounds for lrconvert and svdvals")
    parser.add_argument("--peer-rounds", type=int, default=3, help="rounds for WeightWatcher; 0 leaves it out")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    if options.peer_rounds:
        use_peer("weightwatcher", *WEIGHTWATCHER)
    rows = []
    for name, spectrum in itertools.product(options.models, SPECTRA):
        rows.append(measure(name, spectrum, options.rounds, options.peer_rounds))
        print(describe(rows[-1]), flush=True)
    peers = ("weightwatcher", "scipy") if options.peer_rounds else ()
    save({"benchmark": "analyze", "environment": environment(*peers), "rows": rows}, options.json)


def measure(name: str, spectrum: str, rounds: int, peer_rounds: int) -> dict[str, Any]:
    """Times, ratios and accuracy for one model."""
    model = build_model(name, spectrum)
    analysis = lrconvert.analyze(model, device="cpu")
    weights = dict(model.named_parameters())
    views = {
        layer.name: layer.layout.matrices(weights[layer.weight], layer.groups) for layer in analysis.network.layers
    }
    jobs = {
        "lrconvert": lambda: lrconvert.analyze(model, device="cpu"),
        "svdvals": lambda: [torch.linalg.svdvals(view) for view in views.values()],
    }
    layers = {"lrconvert": len(analysis.spectra), "svdvals": len(views)}
    if peer_rounds:
        layers["weightwatcher"] = watch(model)
        jobs["weightwatcher"] = lambda: watch(model)
    seconds = interleave(jobs, {"lrconvert": rounds, "svdvals": rounds, "weightwatcher": peer_rounds})
    deviations = []
    for layer, view in views.items():
        exact = torch.linalg.svdvals(view.double())
        worst = (analysis.spectra[layer].values - exact).abs().amax(1) / exact[:, 0]
        deviations.append(float(worst.max()))
    return {
        "model": name,
        "weights": spectrum,
        "layers": layers,
        "seconds": {job: summary(values) for job, values in seconds.items()},
        "ratios": {job: ratios(seconds[job], seconds["lrconvert"]) for job in jobs if job != "lrconvert"},
        "largest_deviation": max(deviations),
    }


def watch(model: nn.Module) -> int:
    """WeightWatcher's analysis with its default settings; the number of layers in its report."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import weightwatcher

        return len(weightwatcher.WeightWatcher(model=model).analyze())


def describe(row: dict[str, Any]) -> str:
    """One case as text."""
    targets = {"svdvals": SVDVALS_TARGET, "weightwatcher": WEIGHTWATCHER_TARGET}
    lines = []
    for job, numbers in row["seconds"].items():
        ratio = row["ratios"].get(job)
        stated = row["model"] == "resnet50" and ratio is not None
        fastest = numbers["min"] / row["seconds"]["lrconvert"]["min"]
        lines.append(
            [
                job,
                str(row["layers"][job]),
                spread(numbers, " s"),
                spread(ratio, "×") if ratio else "",
                verdict(ratio["median"], fastest, targets[job]) if stated else "",
            ]
        )
    head = f"\n{row['model']}, {row['weights']} weights; largest deviation {row['largest_deviation']:.1e}·σ_max\n"
    return head + table(["", "layers", "time", "times lrconvert's", ""], lines)


if __name__ == "__main__":
    main()

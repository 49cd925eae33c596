"""How long it takes to factorize a whole network, against the full SVD of every layer, and what accuracy that costs.

    python benchmarks/factorize.py [--json FILE] [--rounds 7] [--models resnet50]

Every layer that shrinks is factorized at a quarter of its full rank, tensors in memory to tensors in memory. Timed in
one process, in turns: the factorization alone (the plan is given); `make_plan` and the factorization; and
`torch.linalg.svd(full_matrices=False)` layer by layer, cut off at the same ranks and split the same way. Weights are
random, seeded, or, in the rows called "decaying", have their i-th singular value divided by i: then float32 may not
be exact enough, and lrconvert does the work again in float64, its worst case.

Excess error: ‖W − V·U‖ above the least that any matrix of that rank can reach (from singular values in float64),
relative to that least; the worst layer counts. It is given for torch's float32 SVD too.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from common import build_model, environment, interleave, ratios, save, spread, summary, table, verdict
from torch import Tensor

import lrconvert
from lrconvert import rewrite
from lrconvert.factorization import factorizing
from lrconvert.plan import Plan
from lrconvert.tensors import refs_of

MODELS, SPECTRA = ("resnet50", "vit_b_16"), ("random", "decaying")
SPEED_TARGET, EXCESS_TARGET = 5, 1e-4
State = dict[str, Tensor]


def main() -> None:
    """Measure every case, print the ratios, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    options = parser.parse_args()
    rows = []
    for name, spectrum in itertools.product(options.models, SPECTRA):
        rows.append(measure(name, spectrum, options.rounds))
        print(describe(rows[-1]), flush=True)
    save({"benchmark": "factorize", "environment": environment(), "rows": rows}, options.json)


def measure(name: str, spectrum: str, rounds: int) -> dict[str, Any]:
    """Times, ratios and accuracy for one model."""
    model = build_model(name, spectrum)
    state = model.state_dict()

    def decide() -> Plan:
        return lrconvert.make_plan(model, "rank_ratio=0.25", keep_first=0, keep_last=False, device="cpu")

    plan = decide()
    jobs = {
        "factorize": lambda: factorize(state, plan),
        "make_plan + factorize": lambda: factorize(state, decide()),
        "torch.linalg.svd": lambda: full_svd(state, plan),
    }
    seconds = interleave(jobs, dict.fromkeys(jobs, rounds))
    least = least_errors(state, plan)
    return {
        "model": name,
        "weights": spectrum,
        "layers": len(plan.low_rank),
        "seconds": {job: summary(values) for job, values in seconds.items()},
        "ratios": {
            job: ratios(seconds["torch.linalg.svd"], values) for job, values in seconds.items() if "svd" not in job
        },
        "excess_error": worst_excess(state, plan, factorize(state, plan), least),
        "excess_error_svd": worst_excess(state, plan, full_svd(state, plan), least),
    }


def factorize(state: State, plan: Plan) -> State:
    """The factorized state dict, by lrconvert."""
    return dict(rewrite.run(factorizing(refs_of(state), plan)))


def full_svd(state: State, plan: Plan) -> State:
    """The factors, as they come from a full SVD of every layer."""
    factors = {}
    for layer in plan.low_rank:
        left, values, right = torch.linalg.svd(
            layer.layer.layout.matrices(state[layer.weight], layer.groups), full_matrices=False
        )
        root = values[:, : layer.rank].sqrt()
        factors[layer.key("v")] = (left[:, :, : layer.rank] * root[:, None, :]).contiguous()
        factors[layer.key("u")] = (root[:, :, None] * right[:, : layer.rank]).contiguous()
    return factors


def least_errors(state: State, plan: Plan) -> dict[str, float]:
    """By layer name, the norm of the singular values that its rank leaves out."""
    least = {}
    for layer in plan.low_rank:
        values = torch.linalg.svdvals(layer.layer.layout.matrices(state[layer.weight], layer.groups).double())
        least[layer.name] = float(values[:, layer.rank :].norm())
    return least


def worst_excess(state: State, plan: Plan, factors: State, least: dict[str, float]) -> float:
    """The largest relative excess of a layer's truncation error above the least possible."""
    worst = 0.0
    for layer in plan.low_rank:
        view = layer.layer.layout.matrices(state[layer.weight], layer.groups).double()
        left = factors[layer.key("v")].double().reshape(*view.shape[:2], layer.rank)
        right = factors[layer.key("u")].double().reshape(len(view), layer.rank, -1)
        worst = max(worst, float((view - left @ right).norm()) / least[layer.name] - 1)
    return worst


def describe(row: dict[str, Any]) -> str:
    """One case as text."""
    lines = []
    for job, numbers in row["seconds"].items():
        ratio = row["ratios"].get(job)
        fastest = row["seconds"]["torch.linalg.svd"]["min"] / numbers["min"]
        stated = verdict(ratio["median"], fastest, SPEED_TARGET) if job == "factorize" and ratio else ""
        lines.append([job, spread(numbers, " s"), spread(ratio, "×") if ratio else "", stated])
    excess = row["excess_error"]
    accurate = "reached" if excess <= EXCESS_TARGET else "MISSED"
    return (
        f"\n{row['model']}, {row['weights']} weights, {row['layers']} layers; worst excess error {excess:.1e} "
        f"(target ≤{EXCESS_TARGET:g}: {accurate}; torch.linalg.svd {row['excess_error_svd']:.1e})\n"
        + table(["", "time", "faster than the SVD", ""], lines)
    )


if __name__ == "__main__":
    main()

"""How fast a factorized recurrent layer runs, against the dense one.

    python benchmarks/recurrent.py [--json FILE] [--rounds 9]

nn.LSTM and others with as many inputs as hidden units, every gate, or, where it says "joint", all gates of a weight
together, at a quarter of the full rank, in turns with the dense module: inference (no gradients) and one training step
(forward and backward). "execution" says what the layer chose: its factors step by step, or torch's fused operator on
the weights multiplied out.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from common import environment, interleave, ratios, save, spread, summary, table, verdict
from torch import nn

from lrconvert.layers.recurrent import RECURRENT_TYPES
from lrconvert.layers.survey import layers_of_module
from lrconvert.plan import LayerPlan, Plan
from lrconvert.surgery import reshape
from lrconvert.views import split

# (kind, hidden, time, batch, all gates together, least ratio wanted in training, in inference)
CASES = (
    ("lstm", 1500, 35, 20, False, 1.2, 2.5),
    ("lstm", 1500, 35, 20, True, 1.2, 2.5),
    ("lstm", 1024, 50, 64, False, 0.95, 0.95),
    ("lstm", 650, 35, 20, False, 0.95, 0.95),
    ("lstm", 300, 35, 20, False, 0.95, 0.95),
    ("lstm", 256, 100, 1, False, 0.95, 0.95),
    ("gru", 1500, 35, 20, False, 0.95, 0.95),
    ("rnn", 1500, 35, 20, False, 0.95, 0.95),
)


def main() -> None:
    """Measure every case, print the ratios, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = [measure(*case, training, options.rounds) for case in CASES for training in (False, True)]
    print(describe(rows))
    save({"benchmark": "recurrent", "environment": environment(), "rows": rows}, options.json)


def measure(
    kind: str,
    hidden: int,
    time: int,
    batch: int,
    joint: bool,
    train_target: float,
    target: float,
    training: bool,
    rounds: int,
) -> dict[str, Any]:
    """Times and ratio for one layer."""
    torch.manual_seed(0)
    dense = RECURRENT_TYPES[kind](hidden, hidden)
    model = nn.ModuleDict({"it": copy.deepcopy(dense)})
    layers = split(layers_of_module(model), [("*", 1)] if joint else [])
    plan = Plan(layers=tuple(LayerPlan.of(layer, hidden // 4) for layer in layers))
    low_rank: Any = reshape(model, plan)["it"]  # type: ignore[index]
    for parameter in low_rank.parameters():
        nn.init.uniform_(parameter, -0.02, 0.02)
    x = torch.randn(time, batch, hidden)
    jobs = {"low rank": lambda: run(low_rank, x, training), "dense": lambda: run(dense, x, training)}
    seconds = interleave(jobs, dict.fromkeys(jobs, rounds))
    return {
        "kind": kind,
        "hidden": hidden,
        "rank": hidden // 4,
        "time": time,
        "batch": batch,
        "joint": joint,
        "training": training,
        "execution": "steps" if low_rank._steps_pay(x, batch) else "fused",
        "seconds": {job: summary(values) for job, values in seconds.items()},
        "ratio": ratios(seconds["dense"], seconds["low rank"]),
        "target": train_target if training else target,
    }


def run(layer: nn.Module, x: torch.Tensor, training: bool) -> None:
    """One forward pass, with its backward pass in training."""
    layer.train(training)
    with torch.set_grad_enabled(training):
        output = layer(x)[0]
    if training:
        layer.zero_grad()
        output.sum().backward()


def describe(rows: list[dict[str, Any]]) -> str:
    """All cases as text."""
    lines = []
    for row in rows:
        fastest = row["seconds"]["dense"]["min"] / row["seconds"]["low rank"]["min"]
        lines.append(
            [
                f"{row['kind']} h {row['hidden']} r {row['rank']} T {row['time']} B {row['batch']}"
                + (" joint" if row["joint"] else ""),
                "training" if row["training"] else "inference",
                row["execution"],
                f"{row['seconds']['dense']['median'] * 1e3:.1f} ms",
                spread(row["ratio"], "×"),
                verdict(row["ratio"]["median"], fastest, row["target"]),
            ]
        )
    return "\n" + table(["", "", "execution", "dense", "times as fast", ""], lines)


if __name__ == "__main__":
    main()

"""How fast factorized mixtures of experts are, against those of transformers (lrconvert.layers.experts).

    python benchmarks/experts.py [--json FILE] [--rounds 9]

One mixture of Mixtral's kind, in float32, with few large experts and with many small ones, all weights at half and at a
quarter of their full rank: inference, and a training step. transformers runs "grouped_mm", its default. Tokens go to
random experts.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import environment, interleave, ratios, save, spread, summary, table
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import lrconvert

# Hidden size, inner size, experts, experts a token goes to.
MIXTURES = ((1024, 2816, 8, 2), (1024, 512, 64, 8))
TOKENS = (1, 16, 128, 512)
RATIOS = (0.5, 0.25)


def main() -> None:
    """Measure every mixture, print the ratios, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    rows = [row for sizes in MIXTURES for row in of_mixture(*sizes, options.rounds)]
    print(describe(rows))
    save({"benchmark": "experts", "environment": environment("transformers"), "rows": rows}, options.json)


def of_mixture(hidden: int, inner: int, experts: int, chosen: int, rounds: int) -> list[dict[str, Any]]:
    """One mixture, at every number of tokens."""
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = "grouped_mm"
    dense = nn.Sequential(MixtralExperts(config))
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.02)
    modules = {"dense": dense}
    for ratio in RATIOS:
        modules[f"{ratio:g}"] = lrconvert.factorize(copy.deepcopy(dense), f"rank_ratio={ratio}", keep_first=0)
    rows = []
    for tokens in TOKENS:
        indices = torch.rand(tokens, experts).argsort(dim=1)[:, :chosen]
        call = torch.randn(tokens, hidden), indices, torch.rand(tokens, chosen)
        jobs = {name: partial(module[0], *call) for name, module in modules.items()}
        steps = {name: partial(step, module, *call) for name, module in modules.items()}
        with torch.inference_mode():
            inference = interleave(jobs, dict.fromkeys(jobs, rounds))
        training = interleave(steps, dict.fromkeys(steps, rounds))
        for kind, seconds in (("inference", inference), ("training", training)):
            rows.append(
                {
                    "mixture": {"hidden": hidden, "inner": inner, "experts": experts, "chosen": chosen},
                    "tokens": tokens,
                    "kind": kind,
                    "seconds": {name: summary(values) for name, values in seconds.items()},
                    "over_dense": {f"{ratio:g}": ratios(seconds["dense"], seconds[f"{ratio:g}"]) for ratio in RATIOS},
                }
            )
    return rows


def step(module: Any, x: Tensor, indices: Tensor, shares: Tensor) -> None:
    """Forward and backward."""
    module.zero_grad(set_to_none=True)
    (module[0](x, indices, shares) ** 2).sum().backward()


def describe(rows: list[dict[str, Any]]) -> str:
    """All cases as text."""
    lines = [
        [
            "{experts} experts of {hidden}→{inner}, {chosen} a token".format(**row["mixture"]),
            str(row["tokens"]),
            row["kind"],
            f"{row['seconds']['dense']['median'] * 1e3:.1f} ms",
            *(spread(row["over_dense"][f"{ratio:g}"], "×") for ratio in RATIOS),
        ]
        for row in rows
    ]
    ranks = [f"rank ratio {ratio:g}" for ratio in RATIOS]
    return "\n" + table(["", "tokens", "", "dense", *ranks], lines)


if __name__ == "__main__":
    main()

"""How much of the models of torchvision, timm and transformers lrconvert reaches, and whether it predicts their costs.

    python benchmarks/coverage.py [torchvision timm hf] [--json FILE] [--every 1]

Every model is built on the meta device, without weights; run once; factorized at a quarter of every full rank, where
that shrinks a layer; and run again. Parameters and MACs must be what was predicted. transformers' models are base
models and causal language models with their default configurations, of which some are no model at all. What fails is
printed. An hour on two cores for all, less with --every N, which takes one model in N.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import environment, save, table

from lrconvert.cost import trace
from lrconvert.models import Architecture, find_architecture
from lrconvert.models.huggingface import architecture as of_transformers
from lrconvert.network import open_network
from lrconvert.plan import LayerPlan, Plan
from lrconvert.surgery import reshape


def main() -> None:
    """Go through the models, print what failed and how much was reached, and save the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=[*SOURCES], metavar="SOURCE", help=", ".join(SOURCES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record to FILE")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one model in N")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = []
    for source in options.sources:
        for number, (name, made) in enumerate(SOURCES[source]()):
            if number % options.every:
                continue
            rows.append({"source": source, "name": name, **of_model(made)})
            if problem := rows[-1].get("problem"):
                print(f"{name}: {problem}", file=sys.stderr)
            gc.collect()
    found = {source: summarized([row for row in rows if row["source"] == source]) for source in options.sources}
    print(describe(found))
    record = {"benchmark": "coverage", "environment": environment("timm", "transformers"), "sources": found}
    save(record, options.json)


def of_model(made: Any) -> dict[str, Any]:
    """What becomes of the model of an architecture, or of the function that finds the architecture."""
    try:
        architecture: Architecture = made if isinstance(made, Architecture) else made()
        model = architecture.build()
    except Exception as error:
        why = error.__cause__ or error
        return {"problem": f"{type(why).__name__}: {(str(why).splitlines() or [''])[0][:150]}"}
    network = open_network(model)
    inputs, before = network.inputs or architecture.inputs, network.trace
    if before is None and inputs:
        with suppress(Exception):
            before = trace(model, inputs)
    layers = [layer for layer in network.layers if not layer.dense_reason]
    layers = [layer for layer in layers if max(1, layer.full_rank // 4) <= layer.break_even_rank]
    plan = Plan(layers=tuple(LayerPlan.of(layer, max(1, layer.full_rank // 4)) for layer in layers))
    params = sum(parameter.numel() for parameter in model.parameters())
    found = {
        "params": params,
        "reached": sum(layer.num_params for layer in layers) / max(params, 1),
        "macs": before.macs if before else None,
    }
    saved = sum(layer.num_params - layer.num_low_rank_params(max(1, layer.full_rank // 4)) for layer in layers)
    change = 0
    for decision in plan.layers if before else ():
        positions = before.positions.get(decision.layer.owner, 0)
        change += decision.layer.low_rank_macs(positions, decision.rank) - decision.layer.macs(positions)
    small = reshape(model, plan)
    if sum(parameter.numel() for parameter in small.parameters()) != params - saved:
        return {**found, "problem": "other parameters than predicted"}
    if before and trace(small, inputs).macs != before.macs + change:
        return {**found, "problem": "other MACs than predicted"}
    return found


def _torchvision() -> Iterator[tuple[str, Any]]:
    import torchvision

    for name in torchvision.models.list_models():
        yield name, lambda name=name: find_architecture(f"torchvision/{name}")


def _timm() -> Iterator[tuple[str, Any]]:
    import timm

    for name in timm.list_models():
        yield name, lambda name=name: find_architecture(f"timm/{name}")


def _transformers() -> Iterator[tuple[str, Any]]:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    def made(kind: str, model_type: str) -> Architecture:
        config = json.loads(CONFIG_MAPPING[model_type]().to_json_string())
        return of_transformers(kind, {"config": config})

    for mapping in (modeling_auto.MODEL_MAPPING_NAMES, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        for model_type, kinds in mapping.items():
            kind = kinds if isinstance(kinds, str) else kinds[0]
            yield kind, lambda kind=kind, model_type=model_type: made(kind, model_type)


SOURCES = {"torchvision": _torchvision, "timm": _timm, "hf": _transformers}


def summarized(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the models of one source."""
    built = [row for row in rows if "params" in row]
    reached = {row["name"]: row["reached"] for row in built}
    return {
        "models": len(rows),
        "built": len(built),
        "with_macs": sum(row["macs"] is not None for row in built),
        "mispredicted": [row["name"] for row in built if "problem" in row],
        "reached": {"median": statistics.median(reached.values()), "quartiles": statistics.quantiles(reached.values())},
        "below_half": sorted(name for name, share in reached.items() if share < 0.5),
        "no_macs": sorted(row["name"] for row in built if row["macs"] is None),
        "not_built": {row["name"]: row["problem"] for row in rows if "params" not in row},
    }


def describe(summaries: dict[str, dict[str, Any]]) -> str:
    """A line for every source."""
    lines = [
        [
            source,
            *(str(found[key]) for key in ("models", "built", "with_macs")),
            str(len(found["mispredicted"])),
            f"{found['reached']['median']:.1%}",
            str(len(found["below_half"])),
        ]
        for source, found in summaries.items()
    ]
    header = ["", "models", "built", "with MACs", "mispredicted", "parameters reached (median)", "models below half"]
    return "\n" + table(header, lines)


if __name__ == "__main__":
    main()

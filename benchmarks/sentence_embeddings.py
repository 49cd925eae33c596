"""A sentence encoder made smaller without training: how well the similarities of sentences keep their order.

    python benchmarks/sentence_embeddings.py --model FOLDER --texts FILE [--seeds 3] [--kept 0.8,0.6,0.4]
        [--methods NAME …] [--pivoted] [--distill-minutes 5 --distill-kept 0.6,0.4] [--projections N] [--json FILE]

FOLDER is a Hugging Face folder (all-MiniLM-L6-v2), FILE has one text a line. For each seed 256 texts to calibrate on,
512 to test on and 4,000 to distil on are drawn, all different. Kept: of the parameters of the encoder's weights.
Figure: rank correlation (Spearman) of the cosine similarities of all pairs of test texts with those of the dense model.
"""

import argparse
import copy
import functools
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor, nn

import lrconvert
from lrconvert.network import open_network
from lrconvert.samples import Call, read_samples

CALIBRATION, TEST, UNLABELLED = 256, 512, 4000
ENCODER = ("*encoder.layer.*",)
# Name to (what is calibrated, allocator, whether layers are then fitted in turn).
METHODS = {
    "weights, uniform": (None, "uniform", False),
    "weights, absolute_error": (None, "absolute_error", False),
    "weights, stable_rank": (None, "stable_rank", False),
    "inputs, uniform": ("inputs", "uniform", False),
    "inputs and gradients, uniform": ("both", "uniform", False),
    "inputs and gradients, output_error": ("both", "output_error", False),
    "inputs and gradients, sensitivity": ("measured", "sensitivity", False),
    "inputs and gradients, output_error, sequential": ("both", "output_error", True),
    "inputs and gradients, sensitivity, sequential": ("measured", "sensitivity", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kept", default="0.8,0.6,0.4", help="without training; '' for none")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME")
    parser.add_argument("--pivoted", action="store_true", help="pivoted factors, instead of plain ones")
    parser.add_argument("--distill-kept", default="0.6,0.4")
    parser.add_argument("--distill-minutes", type=float, default=0.0, help="0: no distillation")
    parser.add_argument("--projections", type=int, help="of the output, a backward pass each; the default if left out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kept = [float(text) for text in options.kept.split(",") if text]
    figures: dict[str, dict[float, list[float]]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            run = Run(options.model, options.texts, seed, Path(folder))
            for name, share, figure in run.without_training(
                kept, options.methods, options.pivoted, options.projections
            ):
                figures.setdefault(name, {}).setdefault(share, []).append(figure)
                print(f"seed {seed}  {name:46} {share:g}  {figure:.4f}", flush=True)
            if options.distill_minutes:
                for share in (float(text) for text in options.distill_kept.split(",")):
                    figure = run.distilled(share, options.distill_minutes, options.pivoted)
                    name = f"output_error, {options.distill_minutes:g} min of distillation"
                    figures.setdefault(name, {}).setdefault(share, []).append(figure)
                    print(f"seed {seed}  {name:46} {share:g}  {figure:.4f}", flush=True)
    shares = sorted({share for each in figures.values() for share in each}, reverse=True)
    rows = [[name, *(spread(each.get(share)) for share in shares)] for name, each in figures.items()]
    print("\n" + common.table(["kept of the encoder's weights", *map(str, shares)], rows))
    print(f"\nrank correlation, mean ± standard deviation of {options.seeds} seeds")
    record = {
        "environment": common.environment("transformers"),
        "model": Path(options.model).name,
        "texts": options.texts.name,
        "seeds": options.seeds,
        "pivoted": options.pivoted,
        "projections": options.projections,
        "figures": figures,
    }
    common.save(record, options.json)


def spread(values: list[float] | None) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


class Run:
    """One seed: its texts, and what the dense model makes of them."""

    def __init__(self, model: str, texts: Path, seed: int, folder: Path) -> None:
        lines = [line.strip() for line in texts.read_text(encoding="utf-8").splitlines()]
        lines = list(dict.fromkeys(line for line in lines if len(line) > 20))
        random.Random(seed).shuffle(lines)
        self.source, self.seed, self.folder = model, seed, folder
        start = 0
        for name, count in (("calibration", CALIBRATION), ("test", TEST), ("unlabelled", UNLABELLED)):
            (folder / f"{name}.txt").write_text("\n".join(lines[start : start + count]) + "\n", encoding="utf-8")
            start += count
        self.network = open_network(model)
        self.dense = lrconvert.load(model)
        self.test = read_samples(str(folder / "test.txt"), self.network, count=TEST).calls
        self.wanted = similarities(self.dense, self.test)
        encoder = sum(layer.num_params for layer in self.layers())
        self.encoder_share = encoder / self.network.num_params

    def layers(self) -> list[Any]:
        return [layer for layer in self.network.layers if layer.kind == "linear" and "encoder.layer." in layer.name]

    def calibrated(self, **settings: Any) -> Any:
        data = str(self.folder / "calibration.txt")
        return lrconvert.calibrate(self.source, data, count=CALIBRATION, seed=self.seed, **settings)

    def plan(self, kept: float, **settings: Any) -> Any:
        """A plan for the encoder alone; `kept` of its parameters."""
        ratio = 1 - (1 - kept) * self.encoder_share
        return lrconvert.make_plan(self.network, param_ratio=ratio, include=ENCODER, keep_first=0, **settings)

    def figure(self, model: nn.Module) -> float:
        """Rank correlation with the dense model."""
        return float(np.corrcoef(ranks(similarities(model, self.test)), ranks(self.wanted))[0, 1])

    def without_training(
        self, shares: list[float], methods: Iterable[str], pivoted: bool, projections: int | None
    ) -> Any:
        """(method, kept, figure) of every method."""
        settings: dict[str, dict[str, Any]] = {
            "inputs": {"two_sided": False},
            "both": {"projections": projections},
            "measured": {"projections": projections, "measure": True},
        }
        calibrated = functools.cache(lambda what: self.calibrated(**settings[what]))
        for name in methods:
            what, allocator, sequential = METHODS[name]
            calibration = calibrated(what) if what else None
            for kept in shares:
                plan = self.plan(kept, calibration=calibration, allocator=allocator, pivoted=pivoted)
                dense = copy.deepcopy(self.dense)
                small = lrconvert.factorize(dense, plan, calibration=calibration, sequential=sequential)
                yield name, kept, self.figure(small)

    def distilled(self, kept: float, minutes: float, pivoted: bool) -> float:
        """The figure after label-free distillation on other texts, of plain factors that are perhaps pivoted then."""
        calibration = self.calibrated()
        plan = self.plan(kept, calibration=calibration, pivoted=pivoted)
        plain = [layer.model_copy(update={"pivoted": False}) for layer in plan.layers]
        plan = plan.model_copy(update={"layers": tuple(plain), "target": None})
        small, better = self.folder / f"small-{kept}", self.folder / f"distilled-{kept}"
        lrconvert.factorize(self.source, plan, output=small, calibration=calibration)
        data = str(self.folder / "unlabelled.txt")
        lrconvert.distill(small, self.source, data, output=better, minutes=minutes, seed=self.seed)
        if pivoted:
            trained, better = better, self.folder / f"pivoted-{kept}"
            lrconvert.export(trained, better, "pivoted")
        return self.figure(lrconvert.load(better))


@torch.no_grad()
def similarities(model: nn.Module, calls: tuple[Call, ...]) -> np.ndarray[Any, Any]:
    """Cosine similarities of all pairs of texts."""
    return pairwise(mean_embeddings(lambda call: call.run(model).last_hidden_state, calls))


def mean_embeddings(hidden_of: Callable[[Call], Tensor], calls: Iterable[Call]) -> Tensor:
    """Unit vectors (texts, channels): means over tokens of what `hidden_of` makes of a call."""
    embeddings = []
    for call in calls:
        hidden = hidden_of(call)
        mask = call.kwargs["attention_mask"][..., None].to(hidden)
        embeddings.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(embeddings)


def pairwise(embeddings: Tensor) -> np.ndarray[Any, Any]:
    """Inner products of all pairs."""
    pairs = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    found: np.ndarray[Any, Any] = (embeddings @ embeddings.T)[pairs[0], pairs[1]].numpy()
    return found


def ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Place of each value in their order."""
    return values.argsort().argsort()


if __name__ == "__main__":
    main()

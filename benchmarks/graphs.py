"""An ONNX graph made smaller with a few examples and no Python model: how well similarities of sentences keep.

    python benchmarks/graphs.py --model FOLDER --texts FILE [--seeds 3] [--kept 0.8,0.6,0.4] [--json FILE]

FOLDER and FILE are those of sentence_embeddings.py, and so are the texts drawn and the figure: the model is exported
with its last hidden states, and the graph alone is factorized, calibrated and run.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np
from sentence_embeddings import CALIBRATION, TEST, Run, mean_embeddings, pairwise, ranks, spread

import lrconvert
from lrconvert.network import open_network
from lrconvert.onnx_graph.graph import Graph
from lrconvert.onnx_graph.module import AdjustableGraph
from lrconvert.samples import read_samples

# Name to (whether examples are used, allocator).
METHODS = {
    "weights, uniform": (False, "uniform"),
    "weights, absolute_error": (False, "absolute_error"),
    "inputs, uniform": (True, "uniform"),
    "inputs, output_error": (True, "output_error"),
    "inputs, sensitivity": (True, "sensitivity"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kept", default="0.8,0.6,0.4")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kept = [float(text) for text in options.kept.split(",")]
    figures: dict[str, dict[float, list[float]]] = {}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for name, share, figure in measure(options.model, options.texts, seed, kept, Path(folder)):
                figures.setdefault(name, {}).setdefault(share, []).append(figure)
                print(f"seed {seed}  {name:30} {share:g}  {figure:.4f}", flush=True)
    rows = [[name, *(spread(each[share]) for share in kept)] for name, each in figures.items()]
    print("\n" + common.table(["kept of the encoder's weights", *map(str, kept)], rows))
    print(f"\nrank correlation, mean ± standard deviation of {options.seeds} seeds")
    record = {
        "environment": common.environment("transformers", "onnxruntime"),
        "model": options.model.name,
        "texts": options.texts.name,
        "seeds": options.seeds,
        "figures": figures,
    }
    common.save(record, options.json)


def measure(model: Path, texts: Path, seed: int, kept: list[float], folder: Path) -> Any:
    """(method, kept, figure) of one seed."""
    run = Run(str(model), texts, seed, folder)
    for file in model.iterdir():  # the tokenizer
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, folder)
    dense, small = folder / "dense.onnx", folder / "small.onnx"
    lrconvert.export(model, dense, "onnx")
    network = open_network(dense)
    test = read_samples(str(folder / "test.txt"), network, count=TEST, batch_size=32).calls

    def places(path: Path) -> np.ndarray[Any, Any]:
        graph = AdjustableGraph(Graph(path), [])
        return ranks(pairwise(mean_embeddings(lambda call: call.run(graph)[0], test)))

    wanted = places(dense)
    calibration = lrconvert.calibrate(dense, folder / "calibration.txt", count=CALIBRATION, seed=seed)
    for name, (by_examples, allocator) in METHODS.items():
        for share in kept:
            plan = lrconvert.make_plan(
                network,
                param_ratio=1 - (1 - share) * run.encoder_share * run.network.num_params / network.num_params,
                include=["*encoder.layer.*"],
                keep_first=0,
                allocator=allocator,
                calibration=calibration if by_examples else None,
            )
            lrconvert.factorize(
                dense, plan, output=small, overwrite=True, calibration=calibration if by_examples else None
            )
            yield name, share, float(np.corrcoef(places(small), wanted)[0, 1])


if __name__ == "__main__":
    main()

"""`demo`: the whole job on the digits that scikit-learn ships, small enough for any machine."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lrconvert.api.analyze import analyze, analyze_record
from lrconvert.api.export import export
from lrconvert.api.factorize import factorize
from lrconvert.api.make_plan import make_plan
from lrconvert.api.train import finetune, train
from lrconvert.checkpoints.atomic import check_writable
from lrconvert.cost import trace
from lrconvert.inputs import one_input
from lrconvert.loading import load
from lrconvert.models.zoo.digits_cnn import INPUT_SHAPE
from lrconvert.report.record import DemoRecord, DemoStep, Record
from lrconvert.timer import latencies
from lrconvert.training.data import Loader, open_dataset
from lrconvert.training.folder import BEST

BATCH_SIZE = 64
RECIPE = {
    "model": "zoo/digits_cnn",
    "dataset": "digits",
    "epochs": 8,
    "batch_size": BATCH_SIZE,
    "opt": "adamw",
    "lr": 2e-3,
    "sched": "cosine",
}


def run_demo(
    folder: str | Path,
    *,
    overwrite: bool = False,
    seed: int = 0,
    show: Callable[[Record], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> DemoRecord:
    """Train a small network, analyze and factorize it, fine-tune, export, and measure each step.

    Args:
        folder: where the checkpoints and the ONNX graph go; made if it is missing.
        overwrite: replace what an earlier demo wrote there.
        seed: of weights and batches.
        show: called with the record of each verb on the way.
        say: called with a line of text before each step.

    Raises:
        LrconvertError: scikit-learn is not installed.
        OutputExistsError: a file of the demo exists in `folder`.
    """
    folder = Path(folder)
    dense, finetuned = folder / "dense" / BEST, folder / "finetuned" / BEST
    low_rank, graph = folder / "lowrank.safetensors", folder / "finetuned.onnx"
    digits = open_dataset("digits")
    assert digits.test is not None
    folder.mkdir(parents=True, exist_ok=True)
    for path in (low_rank, graph):
        check_writable(path, overwrite)

    say(f"1. Train a dense network on {len(digits.train):,} digits; {len(digits.test)} others are for the test.")
    train({**RECIPE, "seed": seed}, dense.parent, overwrite=overwrite)

    say(f"\n2. lrconvert analyze {dense}")
    analysis = analyze(dense)
    if show:
        show(analyze_record(analysis))

    say(f"\n3. lrconvert factorize {dense} -o {low_rank} --auto")
    record = factorize(dense, make_plan(analysis), output=low_rank, overwrite=overwrite)
    if show:
        show(record)

    say(f"\n4. lrconvert finetune {low_rank} --dataset digits --teacher {dense} -o {finetuned.parent}")
    finetune(
        low_rank,
        finetuned.parent,
        dataset="digits",
        teacher=str(dense),
        batch_size=BATCH_SIZE,
        lr=1e-3,
        seed=seed,
        overwrite=overwrite,
    )

    say(f"\n5. lrconvert export {finetuned} -o {graph} --format onnx")
    exported = export(finetuned, graph, "onnx", overwrite=overwrite)
    if show:
        show(exported)

    say("\n6. Side by side")
    files = {"dense": dense, "lowrank": low_rank, "finetuned": finetuned}
    test = next(Loader(digits.test, batch_size=len(digits.test), seed=0).once())
    return _measure(folder, files, graph, (load(dense), load(low_rank), load(finetuned)), test)


def _measure(
    folder: Path,
    files: dict[str, Path],
    graph: Path,
    models: tuple[nn.Module, nn.Module, nn.Module],
    test: tuple[Tensor, Tensor],
) -> DemoRecord:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def run_graph(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])

    rows: list[tuple[str, nn.Module, Path, Callable[[Tensor], Tensor]]] = [
        ("dense", models[0], files["dense"], models[0]),
        ("low rank", models[1], files["lowrank"], models[1]),
        ("low rank, fine-tuned", models[2], files["finetuned"], models[2]),
        ("the same in ONNX", models[2], graph, run_graph),
    ]
    batch = test[0][:BATCH_SIZE]
    with torch.no_grad():
        times = latencies([lambda call=call: call(batch) for *_, call in rows], n=100)  # type: ignore[misc]
        steps = tuple(
            DemoStep(
                name=name,
                num_params=sum(parameter.numel() for parameter in model.parameters()),
                macs=trace(model, one_input(INPUT_SHAPE)).macs,
                nbytes=path.stat().st_size,
                accuracy=float((call(test[0]).argmax(1) == test[1]).float().mean()),
                latency_ms=time.median_ms,
            )
            for (name, model, path, call), time in zip(rows, times, strict=True)
        )
    return DemoRecord(folder=str(folder), batch_size=BATCH_SIZE, steps=steps)

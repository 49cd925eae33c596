"""`demo`: the whole job on the digits that scikit-learn ships, small enough for any machine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lrconvert.api.analyze import analyze, analyze_record
from lrconvert.api.export import export
from lrconvert.api.factorize import factorize, make_plan
from lrconvert.checkpoints.atomic import check_writable
from lrconvert.cost import measure_latency, trace
from lrconvert.errors import LrconvertError
from lrconvert.inputs import one_input
from lrconvert.loading import load, save
from lrconvert.models.zoo.digits_cnn import INPUT_SHAPE, DigitsCNN
from lrconvert.report.record import DemoRecord, DemoStep, Record

BATCH_SIZE = 64
MODEL = "zoo/digits_cnn"


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
        seed: of weights, split and batches.
        show: called with the record of each verb on the way.
        say: called with a line of text before each step.

    Raises:
        LrconvertError: scikit-learn is not installed.
        OutputExistsError: a file of the demo exists in `folder`.
    """
    folder = Path(folder)
    files = {name: folder / f"{name}.safetensors" for name in ("dense", "lowrank", "finetuned")}
    graph = folder / "finetuned.onnx"
    train, test = _digits(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*files.values(), graph):
        check_writable(path, overwrite)
    torch.manual_seed(seed)

    say(f"1. Train a dense network on {len(train[0])} digits; {len(test[0])} others are held out.")
    dense = DigitsCNN()
    _train(dense, train, epochs=8, learning_rate=2e-3)
    save(dense, files["dense"], architecture=MODEL, overwrite=overwrite)

    say(f"\n2. lrconvert analyze {files['dense']}")
    analysis = analyze(files["dense"])
    if show:
        show(analyze_record(analysis))

    say(f"\n3. lrconvert factorize {files['dense']} -o {files['lowrank']} --auto")
    record = factorize(files["dense"], make_plan(analysis), output=files["lowrank"], overwrite=overwrite)
    if show:
        show(record)

    say("\n4. Fine-tune the factors for three epochs.")
    low_rank = load(files["lowrank"])
    finetuned = load(files["lowrank"])
    _train(finetuned, train, epochs=3, learning_rate=1e-3)
    save(finetuned, files["finetuned"], architecture=MODEL, overwrite=overwrite)

    say(f"\n5. lrconvert export {files['finetuned']} -o {graph} --format onnx")
    exported = export(files["finetuned"], graph, "onnx", overwrite=overwrite)
    if show:
        show(exported)

    say("\n6. Side by side")
    return _measure(folder, files, graph, (dense, low_rank, finetuned), test)


def _digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (n, 1, 8, 8) from 0 to 1, labels (n,)) for training, and the same for testing: every fifth digit."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise LrconvertError("the demo needs scikit-learn: pip install 'lrconvert[demo]'") from None
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = len(labels) // 5
    test, train = order[:held_out], order[held_out:]
    return (images[train], labels[train]), (images[test], labels[test])


def _train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, learning_rate: float) -> None:
    """Train with AdamW and a cosine schedule; the model is left in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    steps = epochs * -(-len(data[0]) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for images, labels in _batches(data):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def _batches(data: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for chosen in torch.randperm(len(data[0])).split(BATCH_SIZE):
        yield data[0][chosen], data[1][chosen]


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
        times = measure_latency([lambda call=call: call(batch) for *_, call in rows], n=100)  # type: ignore[misc]
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

"""Arguments and options that several commands share, each declared once."""

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

from lrconvert.errors import UsageError

# Headings of --help, for commands with many options.
NETWORK, LAYERS, EXAMPLES, SPEED, OUTPUT = "The network", "Which layers", "Examples", "Speed", "What is printed"
RANKS = "Ranks: one rule, one budget, or a plan"

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="A .pt, .pth, .bin, .pt2, .safetensors or .onnx file, or a folder.")
]
CheckpointKey = Annotated[
    str | None,
    typer.Option(
        "--checkpoint-key",
        help="Which state dict of a training checkpoint: model, ema, …",
        metavar="KEY",
        rich_help_panel=NETWORK,
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write; the suffix says the format.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Architecture: torchvision/NAME or file.py:factory (which is run).",
        metavar="MODEL",
        rich_help_panel=NETWORK,
    ),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg", help="Keyword argument of the architecture.", metavar="KEY=VALUE", rich_help_panel=NETWORK
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input-shape", help="Shape of one input without the batch.", metavar="3,224,224", rich_help_panel=NETWORK
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include", "-i", help="Only layers like this: a glob, or re:REGEX.", metavar="PATTERN", rich_help_panel=LAYERS
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", "-e", help="Not layers like this; wins over -i.", metavar="PATTERN", rich_help_panel=LAYERS
    ),
]
Init = Annotated[
    Path | None,
    typer.Option(
        "--init", help="The checkpoint at initialisation, to measure ξ.", metavar="CKPT", rich_help_panel=LAYERS
    ),
]
KeepFirst = Annotated[
    int | None,
    typer.Option(
        "--keep-first", help="K: leading layers that stay dense; 1 unless said otherwise.", rich_help_panel=LAYERS
    ),
]
FactorizeLast = Annotated[
    bool,
    typer.Option(
        "--factorize-last", help="The last classifier too; by default it stays dense.", rich_help_panel=LAYERS
    ),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        "--calibrate",
        help="Examples without labels, for least error of the output: a text file, a folder of images, .npz, a "
        "dataset's name, file.py:factory.",
        metavar="DATA",
        rich_help_panel=EXAMPLES,
    ),
]
Examples = Annotated[
    int | None, typer.Option("--examples", help="Of --calibrate; 256 unless said otherwise.", rich_help_panel=EXAMPLES)
]
Evaluate = Annotated[
    str | None,
    typer.Option("--evaluate", help="Labelled images, on whose held-out part accuracy is measured.", metavar="DATASET"),
]
TimedBatch = Annotated[
    int | None,
    typer.Option("--batch-size", help="Of the calls that are timed; 1 unless said otherwise.", rich_help_panel=SPEED),
]
ChannelsLast = Annotated[
    bool,
    typer.Option(
        "--channels-last", help="Images and convolutions are channels_last when they are timed.", rich_help_panel=SPEED
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Fields that overrule the recipe's (lr=0.1).")
]
RunFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder for weights, state, log and report.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the output folder.")]
Dataset = Annotated[
    str | None, typer.Option("--dataset", help="Images: digits, cifar10, fashion-mnist, folder, … or file.py:factory.")
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where the data set lies, or is downloaded to.", metavar="DIR")
]
TensorBoard = Annotated[
    Path | None, typer.Option("--tensorboard", help="Write TensorBoard logs here too.", metavar="DIR")
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the record as JSON on stdout, all else on stderr.", rich_help_panel=OUTPUT)
]
Csv = Annotated[
    bool,
    typer.Option("--csv", help="Print the record's rows as CSV on stdout, all else on stderr.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=OUTPUT)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every row and column.", rich_help_panel=OUTPUT)]


def parse_model_args(given: list[str] | None) -> dict[str, Any]:
    """Keyword arguments from KEY=VALUE texts; a value that reads as a Python literal becomes one."""
    parsed = {}
    for text in given or []:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-arg {text}: write KEY=VALUE")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """(3, 224, 224) from "3,224,224" or "3x224x224"."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {text}: write positive numbers like 3,224,224, without the batch")
    return shape


def parse_examples(examples: int | None, calibrate: str | None) -> int:
    """How many examples to take of --calibrate."""
    if calibrate is None and examples is not None:
        raise UsageError("--examples says more about --calibrate DATA, which is missing")
    return 256 if examples is None else examples


def parse_numbers(option: str, given: list[str] | None) -> dict[str, int]:
    """Pattern to whole number from PATTERN=NUMBER texts given to `option`."""
    parsed = {}
    for text in given or []:
        pattern, equals, number = text.rpartition("=")
        if not equals or not number.isdecimal():
            raise UsageError(f"{option} {text}: write PATTERN=NUMBER, like {option} 'layer4.*=96'")
        parsed[pattern] = int(number)
    return parsed


def parse_multiple(text: str | None) -> int | str | None:
    """8 from "8"; "auto" as it is."""
    if text is None or text == "auto":
        return text
    if not text.isdecimal():
        raise UsageError(f"--rank-multiple {text}: write a whole number, or auto")
    return int(text)


def given(**values: Any) -> dict[str, Any]:
    """The options that were given, paths as text, as fields of a recipe."""
    return {key: str(value) for key, value in values.items() if value is not None}

"""The command line: one thin file a command. Each parses, calls one function of `lrconvert.api`, and renders."""

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

import lrconvert
from lrconvert.cli import (
    analyze,
    compare,
    demo,
    distill,
    evaluate,
    export,
    factorize,
    finetune,
    info,
    recipes,
    sweep,
    train,
)
from lrconvert.errors import LrconvertError

app = typer.Typer(
    help="Make networks smaller and faster by low-rank factorization, and train low-rank networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(analyze.analyze)
app.command()(factorize.factorize)
app.command()(sweep.sweep)
app.command()(train.train)
app.command()(finetune.finetune)
app.command()(distill.distill)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(compare.compare)
app.command()(info.info)
app.add_typer(recipes.app, name="recipes")
app.command()(demo.demo)

# typer keeps its exception classes private, but for this one, whose base every wrong argument raises.
_WrongArguments: type[Exception] = typer.BadParameter.__mro__[1]

# typer returns it for Ctrl-C, as a shell would.
_INTERRUPTED = 130


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lrconvert {lrconvert.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make networks smaller and faster by low-rank factorization, and train low-rank networks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; see `lrconvert.errors` for what the codes mean."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "σ" shows "?" instead of failing
    try:
        result = app(args=None if arguments is None else list(arguments), prog_name="lrconvert", standalone_mode=False)
        sys.stdout.flush()
    except LrconvertError as error:
        return _fail(str(error), error.exit_code)
    except _WrongArguments as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _fail(f"{error.format_message()}{hint}", 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        result = _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong. Python would complain when it flushes once
        # more on its way out, so that what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if result == _INTERRUPTED:
        return _fail("interrupted", _INTERRUPTED)
    return result if isinstance(result, int) else 0


def run() -> NoReturn:
    """Run the command line as a process of its own."""
    code = main()
    if code == _INTERRUPTED:
        # Threads may still be in the middle of a product, and an interpreter that ends under them aborts.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code

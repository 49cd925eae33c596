"""Where a command's record goes: tables, JSON or CSV; and progress while it is being made."""

import csv
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lrconvert.errors import UsageError
from lrconvert.report.record import Record

_LOG_SECONDS = 10.0


class _Console(Console):
    """rich exits by itself when the reader of our output goes away; what to do about it is `main`'s to say."""

    def on_broken_pipe(self) -> None:
        """Raise what rich caught."""
        raise BrokenPipeError


class Sink:
    """Takes a command's record and shows it in the way that was asked for.

    Args:
        as_json: JSON on stdout, and everything else on stderr.
        as_csv: the record's rows as CSV on stdout, and everything else on stderr.
        quiet: no tables and no progress.
        verbose: every row and column.
    """

    def __init__(self, as_json: bool, as_csv: bool, quiet: bool, verbose: bool) -> None:
        if as_json and as_csv:
            raise UsageError("--json and --csv both print on stdout: choose one")
        if quiet and verbose:
            raise UsageError("--quiet and --verbose contradict each other: choose one")
        self.as_json, self.as_csv, self.quiet, self.verbose = as_json, as_csv, quiet, verbose
        self.console = _Console(stderr=as_json or as_csv, highlight=False, markup=False)

    def show(self, record: Record) -> None:
        """Render `record`; of several processes, only the first one speaks."""
        if not first_process():
            return
        if self.as_json:
            print(record.model_dump_json(indent=2))
        elif self.as_csv:
            _print_csv(record)
        elif not self.quiet:
            from lrconvert.report.terminal import render

            render(record, self.console, verbose=self.verbose)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int], Callable[[], None]] | None]:
        """A function for `progress=` arguments: a bar on a terminal, a line now and then in a log, nothing if quiet."""
        console = Console(stderr=True)
        if self.quiet:
            yield None
        elif console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            with Progress(*columns, console=console, transient=True) as bars:

                def start_bar(what: str, steps: int) -> Callable[[], None]:
                    task = bars.add_task(what, total=steps)
                    return lambda: bars.advance(task)

                yield start_bar
        else:
            yield _start_log


def first_process() -> bool:
    """Whether this is the first, or only, process of a run (torchrun sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def _start_log(what: str, steps: int) -> Callable[[], None]:
    """Progress for logs: nothing for short work, a line every ten seconds for long."""
    done, spoke = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, spoke
        done += 1
        if time.monotonic() - spoke >= _LOG_SECONDS:
            spoke = time.monotonic()
            print(f"{what}: {done} of {steps}", file=sys.stderr, flush=True)

    return advance


def _print_csv(record: Record) -> None:
    data = record.model_dump(mode="json")
    rows = data[record.rows] if record.rows else []
    if not rows:
        rows = [{key: value for key, value in data.items() if not isinstance(value, list | dict)}]
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: object) -> object:
    """A list becomes one cell, its items separated by blanks."""
    return " ".join(str(item) for item in value) if isinstance(value, list) else value

"""Every error that lrconvert raises on purpose, each with the exit code of the command line.

    LrconvertError                    1  something failed; the message names the file or layer, and the fix
    ├── CheckpointError               1  a file cannot be read or written
    │   ├── UnsafeCheckpointError     1  reading the file would run code
    │   └── OutputExistsError         1  the output is there already and --overwrite was not given
    ├── WeightError                   1  a weight holds NaN or infinite values
    ├── ModelError                    1  a model cannot be built, or does not match the checkpoint
    ├── PlanError                     1  a plan is malformed or does not match the checkpoint
    ├── UsageError                    2  arguments that contradict each other or make no sense
    │   ├── UnknownNameError          2  no rule, model source or format has this name
    │   └── PatternError              2  a pattern matches nothing
    ├── NothingToCompressError        3  no layer would get smaller
    │   └── TargetError               3  no choice of ranks meets a target; the message says how near one comes
    └── VerificationError             4  what was written does not compute what it should

Anything else that escapes is a bug and keeps its traceback.
"""

import difflib
import math
from collections.abc import Callable, Iterable


class LrconvertError(Exception):
    """Root of the tree drawn above. `exit_code` is what the command line returns."""

    exit_code = 1


class CheckpointError(LrconvertError):
    """A checkpoint cannot be read or written."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the file would run code that is stored in it."""


class OutputExistsError(CheckpointError):
    """The output exists and was not to be overwritten."""


class WeightError(LrconvertError):
    """A weight holds values that no factorization can represent."""


class ModelError(LrconvertError):
    """A model cannot be built, or does not match the checkpoint."""


class PlanError(LrconvertError):
    """A plan is malformed or does not match the checkpoint."""


class UsageError(LrconvertError):
    """Arguments that contradict each other or make no sense."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that nothing is registered under; the message lists the known names, the nearest first.

    Args:
        what: what the name should have named ("rank rule").
        name: the unknown name.
        known: every name that would have worked.
    """

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        shown = ", ".join(known[:20]) + (f", … ({len(known)} in all)" if len(known) > 20 else "")
        super().__init__(f"unknown {what} '{name}': {hint}known: {shown}")


class PatternError(UsageError):
    """A pattern matches nothing."""


class NothingToCompressError(LrconvertError):
    """No layer would get smaller."""

    exit_code = 3


class TargetError(NothingToCompressError):
    """A target that no choice of ranks meets.

    Args:
        target: what was asked for ("--param-ratio 0.1").
        closest: the nearest value that can be reached, in the unit of the target; in the message it is rounded up to
            four digits, so that it can be asked for.
        fix: what to do about it.
        at_most: less than `closest` can be had, not more: it is rounded down.
    """

    def __init__(self, target: str, closest: float, fix: str = "ask for that", *, at_most: bool = False) -> None:
        self.closest = closest
        shown = _rounded(closest, math.floor if at_most else math.ceil)
        super().__init__(f"{target} cannot be reached: the closest is {shown:g}; {fix}")


class VerificationError(LrconvertError):
    """What was written does not compute what it should."""

    exit_code = 4


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """A positive value to four significant digits, by `math.ceil` upwards, by `math.floor` downwards."""
    if not value > 0:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return towards(value / unit) * unit

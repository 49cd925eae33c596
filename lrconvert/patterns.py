"""Choosing layers by name: shell globs in which `*` crosses dots, or regular expressions after `re:`."""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from lrconvert.errors import PatternError, UsageError


def matches(pattern: str, name: str) -> bool:
    """Whether `name` as a whole matches `pattern`."""
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise UsageError(f"pattern '{pattern}' is not a regular expression: {error}") from None


def first_match(patterns: Sequence[str], name: str) -> str | None:
    """The first of `patterns` that matches `name`."""
    return next((pattern for pattern in patterns if matches(pattern, name)), None)


def check_patterns(patterns: Iterable[str], names: Sequence[str], option: str) -> None:
    """Raise PatternError for a pattern that matches none of `names`."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise PatternError(f"{option} '{pattern}' matches no layer; layers are named like: {shown}")

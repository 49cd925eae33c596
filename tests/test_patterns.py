"""Patterns: globs that cross dots, regular expressions, and errors for what matches nothing."""

import pytest

from lrconvert.errors import PatternError, UsageError
from lrconvert.patterns import check_patterns, first_match, matches


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layer4*", "layer4.0.conv1", True),
        ("layer4*", "layer3.0.conv1", False),
        ("*.fc?", "blocks.0.mlp.fc2", True),
        ("fc", "fc", True),
        ("fc", "head.fc", False),
        ("FC", "fc", False),
        ("re:blocks\\.[0-3]\\..*", "blocks.3.qkv", True),
        ("re:blocks", "blocks.3.qkv", False),
        ("", "", True),
    ],
)
def test_matches(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_first_match_keeps_the_order_of_the_patterns():
    assert first_match(["b*", "*"], "abc") == "*"
    assert first_match(["a*", "*"], "abc") == "a*"
    assert first_match([], "abc") is None


def test_a_pattern_that_matches_nothing_is_an_error_that_shows_names():
    with pytest.raises(PatternError, match=r"--include 'layer9\*' matches no layer; layers are named like: fc1, fc2"):
        check_patterns(["fc*", "layer9*"], ["fc1", "fc2"], "--include")


def test_a_broken_regular_expression_is_an_error():
    with pytest.raises(UsageError, match="not a regular expression"):
        matches("re:(", "name")

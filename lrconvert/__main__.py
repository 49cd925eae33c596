"""`python -m lrconvert`, which is also what torchrun starts."""

from lrconvert.cli import run

run()

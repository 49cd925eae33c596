"""`python -m lrconvert`, which is also what torchrun starts."""

import sys

from lrconvert.cli import main

sys.exit(main())

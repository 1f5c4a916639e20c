"""Every environment variable vlmprune reads. Nothing else in the package touches os.environ."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""True when Triton kernels run in Python on CPU tensors (tests); read once, as Triton itself does."""

TRACEBACKS = os.environ.get("VLMPRUNE_DEBUG", "0") == "1"
"""True when the command line shows the traceback of every error, also of bad input."""

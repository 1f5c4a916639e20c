"""Every environment variable vlmprune reads. Nothing else in the package touches os.environ."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""True when Triton kernels run in Python on CPU tensors (tests); read once, as Triton itself does."""

TRACEBACKS = os.environ.get("VLMPRUNE_DEBUG", "0") == "1"
"""True when the command line shows the traceback of every error, also of bad input."""

PDL = os.environ.get("VLMPRUNE_PDL", "0") == "1"
"""True when kernels may be launched before the one before them ends (programmatic dependent launch), where a GPU can: sm_90 on.

They then wait inside for what they read. Never measured yet, so off.
"""

VLLM_UNTESTED = os.environ.get("VLMPRUNE_VLLM_UNTESTED", "0") == "1"
"""True when the plugin for vLLM may run in a release that it was not tried with."""

"""Visual-token pruning for vision-language models. Importing this imports neither transformers nor triton."""

from __future__ import annotations

__version__ = "0.1.0"

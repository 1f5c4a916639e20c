"""Puts examples/glyphworld (and nothing else of the checkout) on the path: it is a folder of scripts, not a package."""

import sys
from pathlib import Path

GLYPHWORLD = Path(__file__).parents[2] / "examples" / "glyphworld"
sys.path.insert(0, str(GLYPHWORLD))

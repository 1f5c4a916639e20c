"""Puts studies/ (and nothing else of the checkout) on the path: it is a folder of scripts, not an installed package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "studies"))

"""What tests of the docs share: the modules of the site, and a small gallery in the place of the drawn one."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
BUDGETS = (192.0, 128.0, 64.0)


@pytest.fixture(scope="session")
def sitepages():
    """The package that makes pages, as mkdocs imports it: from website/."""
    sys.path.insert(0, str(ROOT / "website"))
    import sitepages.dialect
    import sitepages.examples
    import sitepages.methods
    import sitepages.ops
    import sitepages.reference
    import sitepages.tree

    sys.path.remove(str(ROOT / "website"))
    return sitepages


@pytest.fixture(scope="session")
def gallery(tmp_path_factory):
    """A folder as `vlmprune gallery` leaves it: empty pictures, answers that nobody gave, and methods without."""
    from vlmprune.cli.facts import usual
    from vlmprune.policies.registry import BUILT_IN

    out = tmp_path_factory.mktemp("gallery")
    drawn = [name for name, cls in BUILT_IN.items() if usual(cls) is not None]
    answers = [
        {"method": name, "policy": name, "budget": budget, "meets": budget > 64, "right": budget > 128}
        for name in drawn
        for budget in BUDGETS
    ]
    for name in (*drawn, "sheet"):
        Image.new("RGB", (808, 40), "gray").save(out / f"{name}.webp")
    left_out = [{"method": name, "why": "expected settings"} for name in BUILT_IN if name not in drawn]
    told = {"visual_tokens": 576, "layers": 8, "budgets": BUDGETS, "left_out": left_out, "answers": answers}
    (out / "gallery.json").write_text(json.dumps(told))
    return out

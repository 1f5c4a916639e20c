"""``attn_implementation="vlmprune"`` is known to transformers after import, in either order, and nothing else changes."""

import subprocess
import sys
from importlib import import_module

import pytest
from transformers import AttentionInterface, AttentionMaskInterface

from vlmprune.register import add_names

ORDERS = {
    "vlmprune first": "import vlmprune; assert not {'transformers', 'triton'} & set(sys.modules); import transformers",
    "transformers first": "import transformers.modeling_utils; import vlmprune",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_name_is_known_after_import_in_either_order(order):
    code = f"""
import sys
{ORDERS[order]}
from transformers import AttentionInterface, AttentionMaskInterface
for table in (AttentionInterface, AttentionMaskInterface):
    assert "vlmprune" in table() and "sdpa" in table()
utils = sys.modules["transformers.modeling_utils"]
assert "vlmprune" not in type(utils.__spec__.loader).__module__ and utils.__loader__ is utils.__spec__.loader
assert not [f for f in sys.meta_path if "vlmprune" in type(f).__module__]
assert "vlmprune.models" not in sys.modules
import torch
q = torch.ones(1, 2, 3, 8)
layer = torch.nn.Module()
layer.is_causal = True
assert AttentionInterface()["vlmprune"](layer, q, q, q, None)[0].shape == (1, 3, 2, 8)
assert AttentionInterface()["vlmprune"].__module__ == "vlmprune.models.attention.backend"
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_nothing_that_is_registered_is_replaced():
    import_module("vlmprune.models.attention.backend")
    tables = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    before = [dict(table) for table in tables]
    add_names()
    assert before == [dict(table) for table in tables]
    for table in tables:
        ours = {name for name, function in table.items() if function.__module__.startswith("vlmprune")}
        assert (
            "vlmprune" in ours <= {"vlmprune", "vlmprune_masked"}
        )  # the latter where vlmprune.testing is loaded
        assert table["vlmprune"].__module__ == "vlmprune.models.attention.backend"

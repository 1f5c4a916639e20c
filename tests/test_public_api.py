"""What `import vlmprune` promises."""

import subprocess
import sys

import pytest

import vlmprune
from vlmprune import errors
from vlmprune.policies.registry import BUILT_IN, built_in


def test_every_public_name_resolves():
    for name in vlmprune.__all__:
        assert getattr(vlmprune, name) is not None


def test_every_built_in_policy_is_importable_from_the_top():
    for name in BUILT_IN:
        cls = built_in(name)
        assert getattr(vlmprune, cls.__name__) is cls
        assert cls.__name__ in dir(vlmprune)


def test_names_stand_in_the_list_that_type_checkers_read():
    """By hand, since they cannot see what is loaded when first asked for."""
    methods = {built_in(name).__name__ for name in BUILT_IN}
    raised = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert methods | raised | {"attach", "detach", "meter", "prune"} <= {*vlmprune.__all__}
    assert len(vlmprune.__all__) == len({*vlmprune.__all__})


def test_a_fresh_process():
    """Submodules are there without being imported, the light ones load nothing heavy; and a star brings everything."""
    light = ("ops", "policies", "flops", "errors", "images", "testing")
    code = f"""
import sys, torch, vlmprune
before = {{*sys.modules}}
assert all(getattr(vlmprune, name).__name__ == "vlmprune." + name for name in {light})
assert not {{"transformers", "triton"}} & {{*sys.modules}} - before
from vlmprune import *
assert (FastV, meter, InputError) == (vlmprune.policies.FastV, vlmprune.models.meter, vlmprune.errors.InputError)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {*light} <= {*dir(vlmprune)}


def test_unknown_names_are_attribute_errors():
    for name in ("Fastv", "nothing", "_private"):
        with pytest.raises(AttributeError, match=f"module 'vlmprune' has no attribute '{name}'"):
            getattr(vlmprune, name)


def test_list_policies():
    assert vlmprune.list_policies()[:2] == ["fastv", "feather"]

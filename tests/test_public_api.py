"""What `import vlmprune` promises."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import vlmprune
from vlmprune import errors
from vlmprune.policies.registry import BUILT_IN, OURS


def test_every_public_name_resolves():
    for name in vlmprune.__all__:
        assert getattr(vlmprune, name) is not None


def test_every_built_in_policy_is_importable_from_the_top():
    for cls in BUILT_IN.values():
        assert getattr(vlmprune, cls.__name__) is cls
        assert cls.__name__ in dir(vlmprune)


@pytest.mark.parametrize("package", ["vlmprune", "vlmprune.policies", "vlmprune.testing"])
def test_type_checkers_see_what_is_public(package):
    """They cannot see what is loaded when first asked for, so its imports are written out, and no others."""
    module = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    blocks = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    late = [i for block in blocks for i in block.body]
    imports = [i for i in (*tree.body, *late) if isinstance(i, ast.ImportFrom)]
    names = {alias.asname or alias.name for i in imports for alias in i.names if i.module != package}
    assert {*module.__all__} <= names and len(module.__all__) == len({*module.__all__})
    loaded = {alias.name for i in late if i.module != package for alias in i.names}
    assert loaded <= {*module.__all__}
    for name in {alias.name for i in late if i.module == package for alias in i.names}:
        assert getattr(module, name) is import_module(f"{package}.{name}")


def test_every_method_and_error_is_public():
    methods = {cls.__name__ for cls in OURS.values()}
    raised = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert methods <= {*vlmprune.policies.__all__}
    assert methods | raised | {"attach", "detach", "meter", "prune"} <= {*vlmprune.__all__}


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

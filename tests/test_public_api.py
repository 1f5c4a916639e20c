"""What `import vlmprune` promises."""

import pytest

import vlmprune
from vlmprune.policies.registry import BUILT_IN, built_in


def test_every_public_name_resolves():
    for name in vlmprune.__all__:
        assert getattr(vlmprune, name) is not None


def test_every_built_in_policy_is_importable_from_the_top():
    for name in BUILT_IN:
        cls = built_in(name)
        assert getattr(vlmprune, cls.__name__) is cls
        assert cls.__name__ in dir(vlmprune)


def test_unknown_names_are_attribute_errors():
    for name in ("Fastv", "nothing", "_private"):
        with pytest.raises(AttributeError, match=f"module 'vlmprune' has no attribute '{name}'"):
            getattr(vlmprune, name)


def test_list_policies():
    assert vlmprune.list_policies()[:2] == ["fastv", "feather"]

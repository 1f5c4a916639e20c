"""The examples in the docstrings of eval and of what it loads come out as they say."""

import doctest
import importlib
import pkgutil

import pytest

import vlmprune.eval

MODULES = [
    "vlmprune.checkpoints",
    *(f"vlmprune.eval.{m.name}" for m in pkgutil.iter_modules(vlmprune.eval.__path__)),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_is_there_once():
    names = vlmprune.eval.__all__
    assert len({*names}) == len(names) and all(hasattr(vlmprune.eval, name) for name in names)

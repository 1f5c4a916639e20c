"""Every public function shows an example in its docstring, every op's classes and what a policy sees too, and the
examples are true.

Beside what is in their module they may use torch, ops, a tiny ``model`` with the ``inputs`` of one image, and ``ctx``: what a
policy sees of two samples, one image of 2 x 2 tokens and two of them.
"""

import doctest
import importlib
import inspect
import sys

import pytest
import torch

from helpers.tiny import make_batch, make_model
from vlmprune import ops
from vlmprune.policies import Needs, TokenContext
from vlmprune.testing.context import make_context

PACKAGES = ("vlmprune", "vlmprune.ops", "vlmprune.policies", "vlmprune.testing")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def public():
    """Functions in the order of the packages, each once; the classes of ops; what a policy sees."""
    found = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            of_ops = package == "vlmprune.ops" and inspect.isclass(value)
            if inspect.isroutine(value) or of_ops or value is TokenContext:
                found.setdefault(id(value), pytest.param(value, id=f"{package}.{name}"))
    return found.values()


@pytest.fixture(scope="module")
def given():
    needs = Needs(hidden=True, attention="previous")
    model, inputs = make_model(), make_batch([[4, "I", 7]])
    ctx = make_context(needs, [[(2, 2)], [(2, 2), (2, 2)]], 2)
    return {"torch": torch, "ops": ops, "model": model, "inputs": inputs, "ctx": ctx}


@pytest.mark.parametrize("value", public())
def test_examples(value, given):
    name = value.__name__
    names = {**vars(sys.modules[value.__module__]), **given}
    found = doctest.DocTestFinder(exclude_empty=True).find(value, name, globs=names)
    assert any(test.examples for test in found), f"{name}: expected an example in its docstring"
    runner, report = doctest.DocTestRunner(optionflags=FLAGS), []
    failed = sum(runner.run(test, out=report.append).failed for test in found)
    assert failed == 0, "".join(report)

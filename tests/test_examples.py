"""Every public function and class shows an example in its docstring, and the examples are true.

They may use torch, vlmprune and the package they are in by its last name.
"""

import doctest
import importlib
import inspect

import pytest
import torch

import vlmprune

PACKAGES = ("vlmprune.ops",)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def public():
    """(package, name) of the functions and classes that are no exceptions."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isroutine(value) or (inspect.isclass(value) and not issubclass(value, Exception)):
                yield pytest.param(module, name, id=f"{package}.{name}")


@pytest.mark.parametrize("module, name", [*public()])
def test_examples(module, name):
    names = {"torch": torch, "vlmprune": vlmprune, module.__name__.rpartition(".")[2]: module}
    found = doctest.DocTestFinder(exclude_empty=True).find(getattr(module, name), name, globs=names)
    assert any(test.examples for test in found), f"{name}: expected an example in its docstring"
    runner, report = doctest.DocTestRunner(optionflags=FLAGS), []
    failed = sum(runner.run(test, out=report.append).failed for test in found)
    assert failed == 0, "".join(report)

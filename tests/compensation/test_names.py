"""The interface is light; the models are there when asked for."""

import subprocess
import sys

import pytest

import vlmprune.compensation as compensation


def test_every_name_is_there():
    for name in compensation.__all__:
        assert getattr(compensation, name).__name__ == name
        assert name in dir(compensation)
    with pytest.raises(AttributeError, match=r"module 'vlmprune.compensation' has no attribute 'Narrator'"):
        compensation.Narrator  # noqa: B018


def test_the_interface_is_light():
    code = """
import sys
from vlmprune.compensation import Caption, Compensator, Discarded, Known, Remembering
assert "transformers" not in sys.modules
from vlmprune.compensation import Captioner
assert "transformers" in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Runs the command line in this process, on the small trained model in examples/."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlmprune.cli.main import app

EXAMPLE = Path(__file__).parents[2] / "examples" / "glyphworld"


@pytest.fixture
def checkpoint():
    return EXAMPLE / "checkpoint"


@pytest.fixture
def scene():
    return EXAMPLE / "images" / "scene_70001.png"


@pytest.fixture
def cli():
    """Call it with arguments of any type; answers with exit_code, stdout and stderr."""
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def ask(cli, checkpoint, scene):
    """``vlmprune run`` on the example with one question, plus the given arguments."""

    def call(*args, model=checkpoint, image=scene, prompt="locate the green phone ."):
        fixed = (
            "--model",
            model,
            "--image",
            image,
            "--prompt",
            prompt,
            "--dtype",
            "float32",
            "--device",
            "cpu",
        )
        return cli("run", *fixed, *args)

    return call

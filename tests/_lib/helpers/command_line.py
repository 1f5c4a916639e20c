"""Runs the command line in this process, on the small trained model in examples/."""

from pathlib import Path

from typer.testing import CliRunner

from vlmprune.cli.main import app

EXAMPLE = Path(__file__).parents[3] / "examples" / "glyphworld"
CHECKPOINT, SCENE = EXAMPLE / "checkpoint", EXAMPLE / "images" / "scene_70001.png"


def cli(*args):
    """Call it with arguments of any type; answers with exit_code, stdout and stderr."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ask(*args, model=CHECKPOINT, image=SCENE, prompt="locate the green phone ."):
    """``vlmprune run`` on the example with one question, plus the given arguments."""
    asked = ("--model", model, "--image", image, "--prompt", prompt)
    return cli("run", *asked, "--dtype", "float32", "--device", "cpu", *args)

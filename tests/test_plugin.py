"""A policy from another package: installed on its own, found by name, run through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli.main import app

ROOT = Path(__file__).parents[1]
SCENES = ROOT / "examples" / "glyphworld"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the plugin is installed into."""
    target = tmp_path_factory.mktemp("plugin")
    source = tmp_path_factory.mktemp("source")
    for file in ("pyproject.toml", "vlmprune_norm.py"):
        (source / file).write_text((ROOT / "examples" / "plugin" / file).read_text())
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, cwd=source)
    return str(target)


@pytest.fixture
def installed(folder, monkeypatch):
    """The plugin can be imported for the length of a test."""
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("vlmprune_norm", None)


@pytest.mark.usefixtures("installed")
def test_it_is_listed():
    out = CliRunner().invoke(app, ["list", "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout)["norm"]["fields"] == {
        "layer": 2,
        "keep": 0.5,
        "earlier_kv": "full",
        "rectify": False,
    }


@pytest.mark.usefixtures("installed")
def test_it_is_written_by_its_name():
    policy = vlmprune.policy_from("divprune + norm:layer=3,keep=49")
    norm = {"policy": "norm", "layer": 3, "keep": 49, "earlier_kv": "full", "rectify": False}
    assert policy.to_dict()["policies"][1] == norm and vlmprune.policy_from(policy.to_dict()) == policy


@pytest.mark.usefixtures("installed")
def test_it_runs():
    scene = SCENES / "images" / "scene_70001.png"
    model = SCENES / "checkpoint"
    args = ["--model", str(model), "--image", str(scene), "--prompt", "locate the green phone .", "--json"]
    out = CliRunner().invoke(app, ["run", *args, "--repeat", "1", "--policy", "norm:layer=3,keep=49"])
    assert out.exit_code == 0, out.output
    (run,) = json.loads(out.stdout)["runs"]
    assert run["report"]["stages"] == [{"layer": 3, "tokens_in": 196, "tokens_kept": 49}]


def test_without_it_the_name_is_unknown():
    assert "norm" not in vlmprune.list_policies()

"""What the docs say and nobody runs: whether the programs and modules in it would take it.

A shell runs such a block with programs that only note how they were called. Each function here is given a command's words, the
program first, and raises ``AssertionError`` or what the program itself raises.
"""

import argparse
import ast
import importlib
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import typer

import vlmprune
from helpers.warm import run
from vlmprune.cli.main import app
from vlmprune.integrations.lmms_eval.requests import read_policy
from vlmprune.integrations.vllm import ARCHITECTURES
from vlmprune.tuning import expand

ROOT = Path(__file__).parents[3]
EXTRAS = {*tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]}
LEFT_OUT = "..."
"""Stands in a command for what is said elsewhere."""
FOLDERS = "compensator", "scorer"
"""Settings that name a folder, which may be one that the reader has."""
DEEPEST = 32
PARSERS = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args


NOTING = """\
#!/bin/sh
[ "$(basename "$0") $1" != "vlmprune list" ] || exec {warm}/vlmprune "$@"    # a shell goes on with what it prints
{{ printf '%s\\0' "$(basename "$0")" "$@"; printf '\\036\\0'; }} >> "$SAID"
"""
PLUGIN = tomllib.loads((ROOT / "examples" / "plugin" / "pyproject.toml").read_text())
ANNOUNCED = tuple(PLUGIN["project"]["entry-points"]["vlmprune.policies"])
"""Policies of the package in examples/plugin, which is not installed."""


def put_noting(folder: Path, warm: Path) -> None:
    """Programs that note their arguments in the file that the environment calls ``SAID``; ``warm`` has one that runs."""
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text(NOTING.format(warm=warm))
        (folder / name).chmod(0o755)


def check_noted(argv: list[str]) -> None:
    """Every command in the file that ``argv`` names; on stderr the last one is the one that fails."""
    for words in Path(argv[1]).read_text().split("\036\0")[:-1]:
        command = words.split("\0")[:-1]
        sys.stderr.write(f"{shlex.join(command)}\n")
        PROGRAMS[command[0]](command)


class Parsed(BaseException):
    """A script has taken its arguments; it stops there."""


def vlmprune_command(argv: list[str]) -> None:
    """Options and policies of our command line."""
    command, words = typer.main.get_command(app), [word for word in argv[1:] if word != LEFT_OUT]
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"expected one of {', '.join(command.commands)}"
        command = command.commands[words.pop(0)]
    context = command.context_class(command, info_name=argv[1], resilient_parsing=LEFT_OUT in argv)
    with context:
        command.parse_args(context, words)
    for text in context.params.get("policy") or ():
        policy(text)


def policy(text: str) -> None:
    """A policy as typed, with braces where ``vlmprune tune`` has them."""
    if text.endswith((".yaml", ".yml")) or any(f"{setting}=" in text for setting in FOLDERS):
        return
    for one in expand(text, DEEPEST) if "{" in text else [text]:
        if not one.startswith((*ANNOUNCED, "p_sigmoid:", "g_search:", "smaller:")):
            vlmprune.policy_from(one)


def python(argv: list[str]) -> None:
    """A script's options, by its own parser; where it needs a package that is not here, by the names in its folder."""
    words = [word for word in argv[1:] if word != "-P"]
    if words[0] == "-m":
        return
    script = Path(words[0])
    assert script.is_file(), f"{script}: no such file"
    try:
        with stopping("parse_args"), stopping("parse_known_args"):
            run(["python", *words])
    except Parsed:
        return
    except ModuleNotFoundError as error:
        assert not (error.name or "").startswith(("vlmprune", "helpers")), error
    texts = "".join(file.read_text() for file in script.resolve().parent.glob("*.py"))
    own = words[1 : words.index("--") if "--" in words else None]
    unknown = [word for word in own if word.startswith("--") and f'"{word.partition("=")[0]}"' not in texts]
    assert not unknown, f"{script}: options {unknown}"


@contextmanager
def stopping(method: str) -> Iterator[None]:
    """A script that calls this method of its parser stops when it is done."""
    taken = getattr(argparse.ArgumentParser, method)

    def parse(self: Any, *args: Any, **kwargs: Any) -> None:
        # the one is called by the other, which has more to say
        with mock.patch.multiple(argparse.ArgumentParser, parse_args=PARSERS[0], parse_known_args=PARSERS[1]):
            taken(self, *args, **kwargs)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, method, parse):
        yield


def pip(argv: list[str]) -> None:
    """Extras that are asked for are ours."""
    assert argv[1] in ("install", "wheel"), argv
    asked = [
        extra
        for word in argv
        for found in re.findall(r"(?:vlmprune|\.)\[([\w,]+)\]", word)
        for extra in found.split(",")
    ]
    assert set(asked) <= EXTRAS, f"extras: expected some of {sorted(EXTRAS)}, got {asked}"


def make(argv: list[str]) -> None:
    """Targets are in the Makefile."""
    text = (ROOT / "Makefile").read_text()
    for word in argv[1:]:
        name = re.escape(word.replace(".venv-vllm", "$(VLLM)"))
        assert "=" in word or re.search(rf"^{name}:", text, re.MULTILINE), f"{word}: no such target"


def lmms_eval(argv: list[str]) -> None:
    """The policy that is handed to our model."""
    options = dict(pairwise(argv))
    assert options["--model"] == "vlmprune", argv
    read_policy(options["--model_args"].partition("policy=")[2])


def vllm(argv: list[str]) -> None:
    """The override with our architecture and policy."""
    settings = json.loads(dict(pairwise(argv))["--hf-overrides"])
    assert settings["architectures"][0] in [name for name, _ in ARCHITECTURES.values()], settings
    settings["vlmprune"].pop("max_keep", None)
    vlmprune.policy_from(settings["vlmprune"])


def any_words(argv: list[str]) -> None:
    """Nothing of ours is in it."""


PROGRAMS = {
    "vlmprune": vlmprune_command,
    "python": python,
    "pip": pip,
    "make": make,
    "lmms-eval": lmms_eval,
    "vllm": vllm,
    **dict.fromkeys(("cp", "uv", "docker", "hf", "git"), any_words),
}
"""What a block that is not run may call."""


def check_python(text: str, where: str) -> None:
    """It compiles, and every name of ours in it is there."""
    tree = ast.parse(text, where)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("vlmprune") or find_spec(alias.name), (
                    f"{where}: {alias.name}"
                )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlmprune"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                there = hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}")
                assert there, f"{where}: {node.module}.{alias.name}"
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "vlmprune"
        ):
            assert hasattr(vlmprune, node.attr), f"{where}: vlmprune.{node.attr}"

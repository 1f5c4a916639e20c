"""One page an op, made of its docstring, its reference and its table of backends."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import cache
from typing import Any

from sitepages.prose import rows
from sitepages.tree import ROOT
from vlmprune import ops
from vlmprune.ops._dispatch import TABLES

INDEX = "docs/ops.md"
"""The page of all ops: prose, and a table of what each does and from where it is reached."""
ROW = re.compile(r"^\| `(\w+)` \| (.*) \| (.*) \|$", re.MULTILINE)
BACKENDS = {
    "cuda": "CUDA C++ (`csrc/`), on CUDA tensors, where the optional extension was built",
    "triton": "Triton, on CUDA tensors (and on the CPU in its interpreter, for tests, if forced)",
    "reference": "plain PyTorch, anywhere: the specification",
}
BEHIND = {"PrunePlan": "prune_plan", "ScoredPlan": "prune_plan"}
"""Classes whose backends stand under another name."""
HELPERS = ("Pruned", "backend_of", "can_run", "use_backend")
"""Public names that compute nothing: they share a page."""


def navigation() -> list[Any]:
    """The page of all ops, and theirs."""
    return [INDEX, *({name: page_of(name)} for name in own_pages()), {"Backends": "ops/backends.md"}]


def own_pages() -> list[str]:
    """Names that have a page of their own."""
    return [name for name in ops.__all__ if name not in HELPERS]


def page_of(name: str) -> str:
    """Where an op's page is."""
    return "ops/backends.md" if name in HELPERS else f"ops/{name}.md"


def linked(index: str) -> str:
    """The page of all ops with its rows leading to theirs: on GitHub there are none."""
    return ROW.sub(r"| [`\1`](../ops/\1.md) | \2 | \3 |", index)


def pages() -> dict[str, str]:
    """The pages by path."""
    reached = {name: how for name, _, how in ROW.findall((ROOT / INDEX).read_text())}
    found = {page_of(name): _page(name, reached.get(name, "")) for name in own_pages()}
    members = "\n\n".join(_directive(name) for name in HELPERS)
    found["ops/backends.md"] = f"# Backends\n\nWhich one runs an op, and what a stage returns.\n\n{members}\n"
    return found


def _directive(name: str) -> str:
    """What mkdocstrings puts the docstring in the place of; an op has the name of its module."""
    return f"::: {getattr(ops, name).__module__}.{name}"


def _page(name: str, reached: str) -> str:
    """One op: docstring with example, backends, callers, specification."""
    table = TABLES[BEHIND.get(name, name)]
    backends = rows(("backend", "runs"), [(f"`{b.name}`", BACKENDS[b.name]) for b in table])
    callers = [f"[`{path}`](../{path})" for path in callers_of()[name]]
    told = f"From `vlmprune.prune`: {reached}.\n\n" if reached else ""
    called = (
        f"Called in {', '.join(callers)}."
        if callers
        else "Nothing of ours calls it: it is for who builds on the ops."
    )
    parts = [
        f"{_directive(name)}\n    options:\n      heading_level: 1",
        "The example above is run by `tests/test_examples.py`, but for lines marked `+SKIP`.",
        f"## Backends\n\nThe first that can run is taken; `vlmprune info` says which, and why no better one.\n\n{backends}",
        f"## Reached from\n\n{told}{called}",
        *_specification(table),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _specification(table: tuple[Any, ...]) -> list[str]:
    """The source of the reference."""
    loaded = [backend.load() for backend in table if backend.name == "reference"]
    if not loaded:
        return ["## Specification\n\nThat of the op whose plan it is."]
    (function,) = loaded
    file = function.__module__.replace(".", "/") + ".py"
    code = textwrap.dedent(inspect.getsource(function)).rstrip()
    return [f"## Specification\n\nFrom [`{file}`](../{file}):\n\n```python\n{code}\n```"]


@cache
def callers_of() -> dict[str, list[str]]:
    """By public name of ``vlmprune.ops`` the files of the package, the ops themselves aside, that use it."""
    found: dict[str, list[str]] = {name: [] for name in ops.__all__}
    for file in sorted((ROOT / "vlmprune").rglob("*.py")):
        path, text = str(file.relative_to(ROOT)), file.read_text()
        theirs = path.startswith(("vlmprune/ops/", "vlmprune/__init__"))
        if not theirs and ("import ops" in text or "vlmprune.ops" in text):
            for name in _used(ast.parse(text)) & found.keys():
                found[name].append(path)
    return found


def _used(tree: ast.AST) -> set[str]:
    """Names of ``vlmprune.ops`` in a module: attributes of ``ops``, and what is imported from there."""
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops":
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlmprune.ops"):
            used |= {alias.name for alias in node.names}
    return used

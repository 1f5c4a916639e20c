"""The reference of the public Python names: one page a module of those that docs/stability.md lists."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from sitepages import methods, ops
from sitepages.tree import ROOT
from vlmprune import policies
from vlmprune.policies.registry import BUILT_IN

STABILITY = ROOT / "docs" / "stability.md"
ERRORS, OPS = "vlmprune.errors", "vlmprune.ops"
METHODS = {cls.__name__: name for name, cls in BUILT_IN.items()}
"""What has a page of its own, by the name of its class."""


def modules() -> list[str]:
    """The modules whose ``__all__`` is public, and the errors."""
    row = re.search(r"^\| Python names \| `__all__` of (.*?), with", STABILITY.read_text(), re.MULTILINE)
    if row is None:
        raise ValueError(f"{STABILITY}: expected a row of Python names")
    return [*re.findall(r"`([\w.]+)`", row[1]), ERRORS]


def navigation() -> list[Any]:
    """The pages of the reference."""
    return [{name: page_of(name)} for name in modules()]


def page_of(module: str) -> str:
    """Where a module's page is."""
    return f"reference/{module}.md"


def pages() -> dict[str, str]:
    """The pages by path. A name that several modules have is explained once, in the most special of them."""
    home = {name: module for module in modules() for name in names_of(module)}
    return {page_of(module): _page(module, home) for module in modules()}


def names_of(module: str) -> list[str]:
    """What is public of a module. It is read and not imported: some modules take transformers along."""
    if module == policies.__name__:  # where the list is made
        return list(policies.__all__)
    tree = _read(module)
    if module == ERRORS:
        return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and _sets_all(node))
    return list(ast.literal_eval(names))


def _sets_all(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)


def _read(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text())


def _page(module: str, home: Mapping[str, str]) -> str:
    """A module: what it says of itself, and every public name, or the page that explains it."""
    said = (ast.get_docstring(_read(module)) or "").replace("``", "`")
    names = names_of(module)
    elsewhere = {name: _elsewhere(name, home[name]) for name in names}
    own = [f"::: {module}.{name}" for name in names if elsewhere[name].startswith(f"{module}.md#")]
    others = [
        f"[`{name}`]({page})" for name, page in elsewhere.items() if not page.startswith(f"{module}.md#")
    ]
    there = f"Explained elsewhere: {', '.join(others)}." if others else ""
    return "\n\n".join(part for part in (f"# {module}", said, there, *own) if part) + "\n"


def _elsewhere(name: str, module: str) -> str:
    """Where a name is explained, seen from a page of the reference."""
    if name in METHODS:
        return f"../{methods.page_of(METHODS[name])}"
    return f"../{ops.page_of(name)}" if module == OPS else f"{module}.md#{module}.{name}"

"""Imports point one way: triton_kernels < ops < policies < models < checkpoints < eval < tuning, bench < cli, integrations."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"env", "errors", "progress"}
ALLOWED = {
    "constants": set(),
    "env": set(),
    "errors": set(),
    "flops": {"errors"},
    "images": {"errors"},
    "precision": set(),
    "progress": set(),
    "register": set(),
    "triton_kernels": {"env"},
    "ops": BASE | {"constants", "triton_kernels"},
    "compensation": BASE,
    "policies": BASE | {"compensation", "constants", "flops", "ops"},
    "models": BASE | {"compensation", "constants", "flops", "ops", "policies", "register"},
    "checkpoints": BASE | {"policies", "models", "precision"},
    "testing": BASE | {"policies", "models"},
    "guidance": BASE | {"policies", "models", "checkpoints"},
    "smaller": BASE | {"flops", "policies", "models", "checkpoints"},
    "eval": BASE | {"flops", "images", "policies", "models", "checkpoints", "smaller"},
    "tuning": BASE | {"policies", "models", "checkpoints", "eval"},
    "training": BASE | {"compensation", "images", "policies", "models", "checkpoints"},
    "bench": BASE | {"flops", "policies", "models", "testing", "checkpoints", "eval"},
    "view": BASE | {"flops", "images", "policies", "models", "checkpoints", "eval"},
    "web": BASE | {"images", "policies", "models", "checkpoints", "view"},
    "cli": BASE
    | {
        "flops",
        "images",
        "ops",
        "compensation",
        "policies",
        "models",
        "testing",
        "checkpoints",
        "eval",
        "bench",
        "view",
        "web",
    }
    | {"training", "tuning"},
    "integrations": BASE | {"images", "ops", "policies", "models", "checkpoints", "smaller"},
}
"""Part of the package -> the other parts it may import."""
ONLY_IN = {
    "triton": {"triton_kernels"},
    "typer": {"cli"},
    "rich": {"cli"},
    "gradio": {"web"},
    "starlette": {"web"},
    "matplotlib": {"eval", "bench"},
    "yaml": {"policies"},
}
ONLY_IN |= {
    "transformers": {"compensation", "models", "testing", "checkpoints", "training", "bench", "cli"},
    "lmms_eval": {"integrations"},
    "vllm": {"integrations"},
}
"""Outside package -> the only parts that may import it."""


def sources(part):
    folder = ROOT / part if part == "triton_kernels" else ROOT / "vlmprune" / part
    return [*folder.rglob("*.py"), *(p for p in [folder.with_suffix(".py")] if p.is_file())]


def imported(tree, path):
    """Absolute names a module imports, ``from vlmprune import ops`` as ``vlmprune.ops`` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "vlmprune":
                yield from (f"vlmprune.{alias.name}" for alias in node.names)


def complaints(part, name):
    top, _, rest = name.partition(".")
    target = rest.partition(".")[0]
    if top == "vlmprune" and target in ALLOWED and target not in ALLOWED[part] | {part}:
        yield f"{part} must not import {name}"
    if part not in ONLY_IN.get(top, {part}):
        yield f"{part} must not import {name}"


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_of(part):
    paths = sources(part)
    assert paths, f"no source of {part}"
    found = [
        f"{path.relative_to(ROOT)}: {complaint}"
        for path in paths
        for name in imported(ast.parse(path.read_text()), path)
        for complaint in complaints(part, name)
    ]
    assert not found, "\n".join(found)


def test_methods_stand_on_parts_and_both_on_the_interface():
    """But for the list of names, and the package that hands them out."""
    lists = {"registry.py", "__init__.py"}
    for folder, above in ((".", ("parts", "methods")), ("parts", ("methods",))):
        for path in (ROOT / "vlmprune" / "policies" / folder).glob("*.py"):
            upward = tuple(f"vlmprune.policies.{name}" for name in above)
            found = [n for n in imported(ast.parse(path.read_text()), path) if n.startswith(upward)]
            assert not found or path.name in lists, f"{path}: {found}"


def test_a_method_is_read_in_one_sitting():
    """What is longer stands in parts, by its own name."""
    folder = ROOT / "vlmprune" / "policies" / "methods"
    lines = {path.name: len(path.read_text().splitlines()) for path in folder.glob("*.py")}
    assert lines and not {name: n for name, n in lines.items() if n > 110}


def test_every_part_has_a_rule():
    here = {
        p.stem for p in (ROOT / "vlmprune").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert here - {"__init__"} <= ALLOWED.keys()


@pytest.mark.parametrize(
    "part, name",
    [
        ("ops", "vlmprune.models.attach"),
        ("policies", "transformers.cache_utils"),
        ("ops", "triton"),
        ("triton_kernels", "vlmprune.errors"),
    ],
)
def test_the_rules_catch(part, name):
    assert list(complaints(part, name))


def test_only_env_reads_the_environment():
    reads = [
        str(path.relative_to(ROOT))
        for part in ALLOWED
        for path in sources(part)
        if part != "env" and any(word in path.read_text() for word in ("os.environ", "os.getenv"))
    ]
    assert not reads

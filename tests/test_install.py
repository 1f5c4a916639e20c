"""The installed names: our kernels are vlmprune.triton_kernels, the bare name stays free, the import stays light."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import vlmprune

ROOT = Path(__file__).parents[1]


def python(code, cwd="/", *flags):
    """Run code in a fresh interpreter; -P keeps ``cwd`` off sys.path."""
    return subprocess.run(
        [sys.executable, *(flags or ("-P",)), "-c", code], cwd=cwd, capture_output=True, text=True
    )


def test_kernels_are_importable_from_anywhere(tmp_path):
    pytest.importorskip("triton")
    done = python("import vlmprune.triton_kernels as k; print(k.__name__, k.__file__)", tmp_path)
    assert done.returncode == 0, done.stderr
    name, file = done.stdout.split(maxsplit=1)
    assert name == "vlmprune.triton_kernels"
    assert Path(file.strip()).is_file()


def test_bare_name_is_not_ours(tmp_path):
    done = python("import importlib.util as u; print(u.find_spec('triton_kernels'))", tmp_path)
    assert str(ROOT) not in done.stdout


def test_bare_name_raises_when_the_checkout_is_on_the_path():
    done = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import triton_kernels")
    assert done.returncode == 1
    assert "ImportError: this folder is vlmprune's kernel source, imported as 'triton_kernels'" in done.stderr


def test_import_is_light():
    """All in one process, as each would take seconds to import torch again."""
    steps = ["vlmprune", "torch", "vlmprune.ops", "vlmprune.policies", "vlmprune.cli.main"]
    look = "print(sorted({'transformers', 'triton'} & set(sys.modules)))"
    done = python("; ".join(["import sys", *(f"import {step}; {look}" for step in steps)]))
    assert done.returncode == 0, done.stderr
    alone, torch, *ours = done.stdout.splitlines()
    # Newer torch builds may import triton by themselves; then only transformers is ours to avoid.
    assert alone == "[]" and torch in ("[]", "['triton']")
    assert ours == [torch] * 3


def test_top_level_names_resolve():
    for name in vlmprune.__all__:
        assert getattr(vlmprune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        vlmprune.prune_everything  # noqa: B018


def test_console_script():
    (script,) = entry_points(group="console_scripts", name="vlmprune")
    assert script.value == "vlmprune.cli.main:main"
    assert callable(script.load())


def test_wheel_content(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vlmprune", "triton_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*pip, "-w", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    kernels = {p.name for p in (ROOT / "triton_kernels").glob("*.py")}
    assert {f"vlmprune/triton_kernels/{name}" for name in kernels} <= names
    assert {"vlmprune/py.typed", "vlmprune/__init__.py", "vlmprune/cli/main.py"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"vlmprune", f"vlmprune-{vlmprune.__version__}.dist-info"}

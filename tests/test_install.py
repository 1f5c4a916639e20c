"""The installed names: our kernels are vlmprune.triton_kernels, the bare name stays free, the import stays light.

And what is released: content and size of wheel and sdist, one version everywhere, a description whose links lead somewhere.
"""

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml

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


BUILD = """
import os, shutil, sys
from setuptools.build_meta import build_sdist, build_wheel
out = sys.argv[1]
sdist = os.path.join(out, build_sdist(out))
shutil.unpack_archive(sdist, "unpacked")
os.chdir(os.path.join("unpacked", os.path.basename(sdist).removesuffix(".tar.gz")))
build_wheel(out)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of this checkout and the wheel that is built from it, which leave nothing in the checkout."""
    source, out = tmp_path_factory.mktemp("checkout") / "source", tmp_path_factory.mktemp("dist")
    others = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=others, copy_function=os.symlink)
    done = subprocess.run(
        [sys.executable, "-P", "-c", BUILD, out], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def files(folder):
    """What stands in a folder of the checkout, by its path there, but for what is compiled and settings of tools."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and not path.name.startswith(".")
    }


def test_wheel_content(built):
    wheel = built[1]
    assert wheel.name == f"vlmprune-{vlmprune.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == files("vlmprune") | {f"vlmprune/{name}" for name in files("triton_kernels")}


def test_sdist_content(built):
    """What builds the wheel, with the extension or without, and no weights, pictures and results."""
    sdist = built[0]
    assert sdist.stat().st_size < 1_000_000
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    texts = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md"}
    texts |= {"pyproject.toml", "setup.py"}
    made = {name for name in names if name.startswith("vlmprune.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == texts | files("vlmprune") | files("triton_kernels") | files("csrc")


def test_one_version_everywhere(built):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    found = {project["version"], citation["version"], changes[1], metadata_of(built[1])["Version"]}
    assert found == {vlmprune.__version__}
    assert citation["license"] == project["license"]
    assert citation.get("repository-code") == project.get("urls", {}).get("Repository")


def metadata_of(wheel):
    """The wheel's METADATA; its payload is the description."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


absolute = runpy.run_path(str(ROOT / "setup.py"))["absolute"]
HOME = "https://example.org/owner/vlmprune"


@pytest.mark.parametrize(
    ("text", "with_repository", "without"),
    [
        ("[a](docs/a.md#b)", f"[a]({HOME}/blob/v1.2/docs/a.md#b)", "a"),
        (
            "[`a`, b](a.md), [c](#d)",
            f"[`a`, b]({HOME}/blob/v1.2/a.md), [c]({HOME}/blob/v1.2/README.md#d)",
            "`a`, b, c",
        ),
        ("![a](docs/a.png)", f"![a]({HOME}/raw/v1.2/docs/a.png)", ""),
        ("[![a](https://b.c)](D)", f"[![a](https://b.c)]({HOME}/blob/v1.2/D)", "![a](https://b.c)"),
        ("[a](https://b.c)", "[a](https://b.c)", "[a](https://b.c)"),
        ("`a[0](b)` [1] (c)", "`a[0](b)` [1] (c)", "`a[0](b)` [1] (c)"),
        ("```python\na[0](b)\n```", "```python\na[0](b)\n```", "```python\na[0](b)\n```"),
    ],
)
def test_links_of_the_description(text, with_repository, without):
    assert absolute(text, HOME, "1.2") == with_repository
    assert absolute(text, None, "1.2") == without


@pytest.mark.parametrize("repository", [None, HOME])
def test_description_has_absolute_links_only(repository):
    """Package indexes show it where the repository's files are not; setup.py knows Markdown's links alone."""
    shown = absolute((ROOT / "README.md").read_text(), repository, "1.2")
    shown = re.sub(r"```.*?```|`[^`]*`", "", shown, flags=re.DOTALL)
    assert re.findall(r"\]\((?!https?://)[^)\s]+\)", shown) == []
    assert re.findall(r"""(?:src|href)=["'](?!https?://)[^"']*""", shown) == []


def test_description_is_the_readme(built):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme, found = (ROOT / "README.md").read_text(), metadata_of(built[1])
    assert found["Description-Content-Type"] == "text/markdown"
    shown = absolute(readme, project.get("urls", {}).get("Repository"), project["version"])
    assert found.get_payload(decode=True).decode().strip() == shown.strip()


FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
NEEDED = {"markdown": {"value"}, "textarea": {"label"}, "input": {"label"}, "dropdown": {"label", "options"}}
NEEDED["checkboxes"] = NEEDED["dropdown"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_issue_forms(form):
    """What GitHub refuses to show: https://docs.github.com/en/communities, "Syntax for issue forms"."""
    found = yaml.safe_load(form.read_text())
    assert {*found} == {"name", "description", "body"}
    names = [field["id"] for field in found["body"] if field["type"] != "markdown"]
    labels = [field["attributes"]["label"] for field in found["body"] if field["type"] != "markdown"]
    assert names and len({*names}) == len(names) and len({*labels}) == len(labels)
    for field in found["body"]:
        known = NEEDED[field["type"]] | {"label", "description", "placeholder", "render", "options"}
        assert NEEDED[field["type"]] <= {*field["attributes"]} <= known
        assert {*field} <= {"type", "id", "attributes", "validations"}

"""Every code block of the docs runs: a page's Python in one namespace, its shell lines in bash, both in the order of the page.

What cannot run here says why in a comment on the line before (`helpers.blocks`); a shell then runs it with programs that only
look at their arguments, and of Python the names are looked up. The ids of checkpoints are those of a small model (`helpers.hub`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

pytest.importorskip("mkdocs", reason="the docs are tested in .venv-pages: make test-pages")

from helpers.blocks import Block, read_blocks
from helpers.hub import GLYPHWORLD, make_hub
from helpers.said import PROGRAMS, check_python, put_noting
from helpers.warm import put_programs
from vlmprune import policy_from
from vlmprune.policies.registry import BUILT_IN

ROOT = Path(__file__).parents[2]
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FILES += [
    file
    for name in ("examples", "studies", "benchmarks", "csrc")
    for file in sorted((ROOT / name).rglob("README.md"))
]
PAGES = {
    str(file.relative_to(ROOT)): read_blocks(str(file.relative_to(ROOT)), file.read_text()) for file in FILES
}
REASONS = {
    "needs vLLM": "the plugin's own tests run it: make test-vllm",
    "needs a server": "of vLLM",
    "needs lmms-eval": "some 140 packages: make test-eval",
    "needs a GPU": "or Triton on one",
    "needs torchvision": "which PyPI has beside torch's CUDA build alone",
    "needs Ray": "a package that nothing else here needs",
    "needs a package index": "it installs or downloads",
    "makes environments": "gigabytes of them",
    "makes a wheel": "the package's own tests do",
    "takes minutes": "of measuring or training",
    "takes hours": "of measuring or training",
    "a search takes minutes": "of measuring",
    "vLLM has an environment of its own": "make test-vllm",
    "needs an account": "of a hub",
    "waits for visitors": "a server: tests/pages/test_web.py",
    "an outline": "stands for code or settings of the reader's",
}
"""How a reason begins -> what is meant."""
THEIRS = "needs FastV's fork", "needs kvpress", "their scripts", "a release"
"""How reasons begin that are about code of others, of which nothing is known here, or about what must never be tried."""
RUN = {"python", "bash"}
READ = {"toml": tomllib.loads, "json": json.loads, "yaml": yaml.safe_load}
"""Languages of files."""
SHOWN = {"", "text"}
"""Drawings and what something printed: no commands."""
LINKED = ("examples", "studies", "benchmarks", "docs", "vlmprune", "Makefile", "pyproject.toml")
HARMLESS = "basename", "cat", "cp", "head", "ls", "mkdir", "mv", "sort", "tail", "tr", "wc"
"""Beside our own the programs that blocks may call: none that installs, publishes or builds."""
LIMIT = 300.0


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A warm process, the programs that ask it, and the environment of a reader who has the checkpoints."""
    base = tmp_path_factory.mktemp("warm")
    make_hub(base / "hub")
    environ = {
        key: value for key, value in os.environ.items() if not key.startswith(("VLMPRUNE", "HF_", "PYTEST"))
    }
    environ |= {
        "HF_HOME": str(base / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",
        "MPLBACKEND": "Agg",
    }
    environ |= {"PYTHONPATH": str(ROOT / "tests" / "_lib"), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    put_programs(base / "run", ("vlmprune", "python"), base / "socket", "run")
    for tool in HARMLESS:
        (base / "run" / tool).symlink_to(shutil.which(tool))
    put_programs(base / "page", ("page",), base / "socket", "page")
    put_programs(base / "check", ("check",), base / "socket", "check")
    put_noting(base / "noting", base / "run")
    for tool in ("basename", "tr"):
        (base / "noting" / tool).symlink_to(shutil.which(tool))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "helpers.warm_pages", base / "socket"],
        env=environ,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    yield base, environ
    process.kill()
    process.wait()


@pytest.fixture
def reader(tmp_path):
    """The folder a reader is in: the checkout, with a photo of theirs, where nothing that is written stays."""
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    with Image.open(GLYPHWORLD / "images" / "scene_70001.png") as scene:
        scene.convert("RGB").save(tmp_path / "photo.jpg")
    return tmp_path


def call(command, folder, environ):
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=LIMIT)


def run(warm, folder, blocks):
    """Run blocks as one page."""
    base, environ = warm
    (folder / ".venv" / "bin").symlink_to(base / "run")
    listed = folder / "blocks.json"
    listed.write_text(json.dumps([vars(block) for block in blocks]))
    done = call([base / "page" / "page", listed], folder, environ | {"PATH": str(base / "run")})
    sys.stdout.write(
        done.stdout[-20000:] + done.stderr[-20000:]
    )  # how long each block took, for `pytest -rP`
    assert done.returncode == 0, f"{blocks[0].page}\n{done.stderr[-4000:] or done.stdout[-4000:]}"


def look(warm, folder, blocks):
    """Let bash say a page's blocks, one after the other, to programs that look at their arguments."""
    base, environ = warm
    text = "".join(f"echo '--- {block.where}' >&2\n{block.text}" for block in blocks)
    said, path = folder / "said", f"{base / 'noting'}"
    said.touch()
    (folder / ".venv" / "bin").symlink_to(path)
    bash = [shutil.which("bash"), "-eo", "pipefail", "-c", text]
    done = call(bash, folder, environ | {"PATH": path, "SAID": str(said)})
    assert done.returncode == 0, done.stderr[-4000:]
    done = call([base / "check" / "check", said], folder, environ)
    assert done.returncode == 0, f"{blocks[0].page}\n{done.stderr[-4000:]}"


def tree():
    """Every file where a page could leave one."""
    found = (
        path for name in LINKED[:5] for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts
    )
    return {str(path.relative_to(ROOT)) for path in found}


@pytest.mark.parametrize(
    "page",
    [page for page, blocks in PAGES.items() if any(b.language in RUN and not b.reason for b in blocks)],
)
def test_runs(page, warm, reader):
    before = tree()
    run(warm, reader, [block for block in PAGES[page] if block.language in RUN and not block.reason])
    assert tree() <= before, "a page leaves files in the checkout"


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if any(b.reason for b in blocks)])
def test_says_what_is_there(page, warm, reader):
    left_out = [block for block in PAGES[page] if block.reason and not block.reason.startswith(THEIRS)]
    look(warm, reader, [block for block in left_out if block.language == "bash"])
    for block in left_out:
        if block.language == "python":
            check_python(block.text, block.where)


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks])
def test_languages_and_reasons(page):
    for block in PAGES[page]:
        assert block.language in RUN | SHOWN | READ.keys(), f"{block.where}: how is {block.language!r} run?"
        READ.get(block.language, str)(block.text)
        known = not block.reason or block.reason.startswith((*REASONS, *THEIRS))
        assert known, f"{block.where}: expected one of {', '.join(REASONS)}, got {block.reason!r}"
        commands = re.findall(rf"^(?:\$ |(?:{'|'.join(PROGRAMS)}) ).*$", block.text, re.MULTILINE)
        assert block.language in RUN or not commands, (
            f"{block.where}: expected ```bash, as it holds {commands[0]!r}"
        )


@pytest.mark.parametrize(
    "command, why",
    [
        ("vlmprune run --modle MODEL --image photo.jpg --prompt Where?", "No such option"),
        ("vlmprune eval --questions QUESTIONS --out results", "Missing parameter"),
        ("vlmprune bench --shape cpu --policy fastv:leyer=2", "leyer"),
        ("vlmprune look", "expected one of"),
        ("python examples/glyphworld/train.py --out A --minuets 5", "unrecognized arguments"),
        ("python examples/glyphworld/no_such.py", "no such file"),
        ("python examples/serving/client.py Where? --imgae photo.jpg", "imgae"),
        ("pip install '.[evals]'", "evals"),
        ("make tests", "no such target"),
        ("lmms-eval --model vlmprune --model_args pretrained=MODEL,policy=fastv:kep=0.5", "kep"),
        (
            """vllm serve MODEL --hf-overrides '{"architectures": ["VLMPruneLlava"], "vlmprune": {"policy": "divprune"}}'""",
            "VLMPruneLlava",
        ),
        ("rm -r docs", "command not found"),
    ],
)
def test_looking_finds(command, why, warm, reader):
    with pytest.raises(AssertionError, match=re.escape(why)):
        look(warm, reader, [Block("a page", 1, "bash", command + "\n")])


@pytest.mark.parametrize(
    "code", ["import vlmprune.polices", "from vlmprune import FastW", "vlmprune.prone(model, policy)", "a b"]
)
def test_looking_finds_names(code):
    with pytest.raises((AssertionError, SyntaxError)):
        check_python(f"import vlmprune\n{code}", "a page")


@pytest.mark.parametrize(
    "language, code", [("python", "print(model)"), ("bash", "false | cat"), ("bash", "make help")]
)
def test_running_finds(language, code, warm, reader):
    with pytest.raises(AssertionError):
        run(warm, reader, [Block("a page", 1, language, code)])


def test_notes_are_read():
    page = "<!-- not run: needs a GPU -->\n```bash\na\n```\n\n- b\n\n  <!-- given: x, y -->\n  <!-- run with 1 for 22 -->\n  ```python\n  22\n  ```\n"
    shell, python = read_blocks("p.md", page)
    assert (shell.reason, shell.text, shell.where) == ("needs a GPU", "a\n", "p.md:3")
    assert (python.given, python.text, python.line) == (("x", "y"), "1\n", 11)
    with pytest.raises(AssertionError, match="expected '3' in the block"):
        read_blocks("p.md", "<!-- run with 4 for 3 -->\n```python\n22\n```\n")


def method_blocks(sitepages, gallery):
    pages = sitepages.methods.pages(json.loads((gallery / "gallery.json").read_text()))
    return {page: read_blocks(page, text) for page, text in pages.items()}


COMMAND = re.compile(
    r'vlmprune run (?P<asked>.*) \\\n    --policy "(?P<policy>[^"]*)" --compare --save kept.png\n'
)


def test_commands_of_methods(sitepages, gallery, warm, reader):
    """One command for all methods that are asked the same: each alone would load the model again."""
    asked = defaultdict(list)
    for page, blocks in method_blocks(sitepages, gallery).items():
        for block in blocks:
            if block.language == "bash":
                match = COMMAND.fullmatch(block.text)
                assert match, f"{page}: {block.text}"
                asked[match["asked"]].append(match["policy"])
    assert sum(map(len, asked.values())) > len(BUILT_IN) - 3
    blocks = []
    for words, texts in asked.items():
        policies = " ".join(f'--policy "{text}"' for text in texts)
        line = f"vlmprune run {words} --repeat 1 --max-new-tokens 2 {policies} --save kept.png"
        blocks.append(Block("methods", len(blocks), "bash", line))
    run(warm, reader, blocks)


def test_python_of_methods(sitepages, gallery, warm, reader):
    """In one namespace, with a model that is there."""
    names = ("model", "inputs", "small")
    blocks = [
        b for some in method_blocks(sitepages, gallery).values() for b in some if b.language == "python"
    ]
    assert len(blocks) == len(BUILT_IN)
    run(warm, reader, [replace(block, given=names) for block in blocks])


def test_python_is_what_is_typed(sitepages):
    """Command and Python of a method's page are one policy."""
    import vlmprune

    examples = sitepages.examples
    for name, cls in BUILT_IN.items():
        typed = examples.preset(cls)
        if typed:
            made = eval(f"vlmprune.{cls.__name__}({examples.as_python(typed)})", {"vlmprune": vlmprune})
            assert made == policy_from(f"{name}:{typed}")


def test_blocks_of_ops_compile(sitepages):
    """They are the references, which tests/ops runs."""
    for page, text in sitepages.ops.pages().items():
        for block in read_blocks(page, text):
            assert block.language == "python"
            compile(block.text, block.where, "exec")

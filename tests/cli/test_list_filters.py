"""``vlmprune list`` with filters, and of one method: schedule, settings with what they say, how it was checked."""

import json
from dataclasses import MISSING, dataclass, replace
from importlib import metadata
from typing import ClassVar

import pytest

from helpers.command_line import cli
from helpers.methods import usual
from vlmprune.cli.docstrings import agreement, settings_docs
from vlmprune.cli.method import schedule
from vlmprune.models.host.families import FAMILIES
from vlmprune.models.host.fitting import settings_for
from vlmprune.policies import (
    ACCM,
    LVLMCSP,
    DivPrune,
    FasterVLM,
    FastV,
    Feather,
    Needs,
    PruningPolicy,
    RandomDeep,
    Reduction,
    SparseVLM,
    Stages,
    VScan,
    WithoutSinks,
    registry,
)
from vlmprune.policies.registry import BUILT_IN, fields_of
from vlmprune.testing.context import make_context

AS_SET = [name for name, cls in BUILT_IN.items() if MISSING in fields_of(cls).values()]


def listed(*args):
    done = cli("list", "--json", *args)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def everything():
    return listed()


@pytest.mark.parametrize("where", ["before", "inside", "both"])
def test_where_a_policy_acts(where, everything):
    found = listed("--where", where)
    layers = {name: usual(name).layers for name in BUILT_IN if name not in AS_SET}
    both = {name: (0 in own, any(own)) for name, own in layers.items()}
    wanted = {"before": (True, False), "inside": (False, True), "both": (True, True)}[where]
    assert set(found) & set(BUILT_IN) == {name for name, own in both.items() if own == wanted}
    assert all(found[name] == everything[name] for name in found)


def test_whether_it_looks_at_the_text(everything):
    """The two halves are everything but what depends on settings."""
    aware, blind = listed("--text-aware"), listed("--no-text-aware")
    assert {"fastv", "cdpruner", "vscan"} <= aware.keys() and {"divprune", "random"} <= blind.keys()
    assert not aware.keys() & blind.keys()
    assert everything.keys() - aware.keys() - blind.keys() == set(AS_SET) and "accm" in AS_SET


def test_filters_combine(everything):
    found = listed("--where", "before", "--text-aware", "--family", "qwen2_5_vl")
    wanted = {n for n, p in everything.items() if p["where"] == "before" and p["text_aware"] is True}
    assert found.keys() == wanted and wanted
    assert {policy["with"] for policy in found.values()} == {""}  # positions are kept by default


def test_a_family_by_what_a_policy_declares():
    assert listed("--family", "llava")["fastervlm"]["with"] == ""
    found = listed("--family", "qwen2_5_vl")
    assert (found["fastv"]["with"], found["fastervlm"]["with"]) == ("", "")
    released = "fastervlm:positions=pack"
    assert listed(released, "--family", "llava")[released]["with"] == ""
    assert listed(released, "--family", "qwen2_5_vl")[released]["with"] == "positions=keep"
    told = "accm:selection=fastv:layer=0,compensator=helpers.methods:echo"
    assert cli("list", told).exit_code == 2  # FastV cannot act at layer 0
    told = "accm:selection=uniform:layer=0,compensator=helpers.methods:echo"
    assert listed(told, "--family", "llava").keys() == {told}
    assert listed(told, "--family", "qwen3_vl") == {}


def test_positions_and_texts_of_composed_policies():
    packing = FasterVLM(positions="pack")
    texts = ACCM(selection=DivPrune(positions="keep"), compensator=lambda images, candidates: [])
    for family, entry in FAMILIES.items():
        assert settings_for(family, Stages([packing, FastV()])) == ({} if entry.packs else None)
        assert settings_for(family, Stages([texts, FastV()])) == ({} if entry.packs else None)
        assert settings_for(family, WithoutSinks(packing)) == ({} if entry.packs else None)
        assert settings_for(family, WithoutSinks(FastV())) == {}
        assert settings_for(family, VScan()) == {}
        released = settings_for(family, VScan(positions="pack"))
        assert released == ({} if entry.packs else {"positions": "keep"})


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_policy_declares_is_what_it_does(name):
    """The families go by ``packs`` and ``inserts``, a run by what ``select`` returned."""
    policy = usual(name)
    assert done_by(policy) == (policy.packs, policy.inserts)
    if "positions" in policy.__dataclass_fields__:
        released = replace(policy, positions="pack")
        assert done_by(released) == (True, False)


def done_by(policy):
    """Whether it packs positions at any stage, and whether it inserts a text."""
    packs, inserts = False, False
    for layer in policy.layers:
        choice = policy.select(make_context(policy.needs(layer), [[(24, 24)]], layer))
        change = choice if isinstance(choice, Reduction) else Reduction(choice)
        packs, inserts = packs or change.positions == "pack", inserts or change.inserted is not None
    return packs, inserts


def test_an_unknown_family_is_one_error():
    done = cli("list", "--family", "blip_2")
    assert done.exit_code == 2 and done.stderr.count("error:") == 1
    assert f"error: --family: expected one of {', '.join(FAMILIES)}, got 'blip_2'\n" in done.stderr
    refused = cli("list", "--family", "paligemma")
    assert refused.exit_code == 2 and "got 'paligemma' (the whole prompt attends in both" in refused.stderr


def test_no_match_is_one_line():
    asked = ("--where", "both", "--no-text-aware")
    assert listed(*asked) == {}
    for how in ((), ("--markdown",)):
        done = cli("list", *asked, *how)
        assert done.exit_code == 0 and done.stdout == "no policy fits --where both --no-text-aware\n"
    assert cli("list", "fastv", "--where", "before").stdout == "no policy fits --where before\n"


def test_a_preset_of_what_is_typed_is_one_that_can_be_typed():
    assert cli("list", "fastv:layer=3,keep=9", "--budget", "192").stdout == "fastv:layer=2,keep=166\n"


def test_what_depends_on_settings_is_named():
    done = cli("list", "--where", "before", "--json")
    assert done.stderr == f"left out, as it depends on their settings: {', '.join(AS_SET)}\n"
    assert cli("list", "--json").stderr == ""


def test_markdown_of_some():
    chosen = ("--markdown", "--where", "both", "--family", "qwen2_vl")
    rows = cli("list", *chosen).stdout.splitlines()
    assert {"vscan", "star"} <= {row.split("`")[1] for row in rows[2:]}
    rows = cli("list", "vscan:positions=pack", *chosen).stdout.splitlines()
    heads, cells = ([cell.strip() for cell in row.split("|")] for row in (rows[0], rows[2]))
    assert cells[heads.index("with")] == "positions=keep"


@pytest.mark.parametrize(
    "name", ["", "x" * 3, "fastv:nosuch=1", "fastv:layer=0", "fastv + fastv", "nosuch.yaml"]
)
def test_a_wrong_name_or_setting_is_one_line(name):
    done = cli("list", name)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_schedule_is_what_the_policy_counts():
    found = listed("pyramiddrop")["pyramiddrop"]
    assert [(s["layer"], s["tokens"]) for s in found["schedule"]] == [(8, 288), (16, 144), (24, 72)]
    assert found["mean_tokens"] == (8 * 576 + 8 * 288 + 8 * 144 + 8 * 72) / 32
    assert {s["runs"] for s in found["schedule"]} == {"one pass"}
    found = listed("fastv:layer=3,keep=0.4")["fastv:layer=3,keep=0.4"]
    assert [(s["layer"], s["tokens"]) for s in found["schedule"]] == [(3, 230)]
    assert found["fields"]["keep"] == 0.4 and found["mean_tokens"] == (3 * 576 + 29 * 230) / 32
    deep = listed("divprune:keep=0.5 + random_deep:layer=40,keep=0.25")
    (found,) = deep.values()
    assert [(s["layer"], s["tokens"]) for s in found["schedule"]] == [(0, 288), (40, 72)]
    assert found["mean_tokens"] is None  # LLaVA-1.5-7B has 32 layers


def test_the_schedule_of_tokens_that_come_back():
    found = listed("lvlm_csp")["lvlm_csp"]
    assert [(s["layer"], s["tokens"]) for s in found["schedule"]] == [(0, 144), (8, 576), (12, 144)]
    assert found["mean_tokens"] == (8 * 144 + 4 * 576 + 20 * 144) / 32
    assert found["schedule"][1]["reads"] == "tokens that were set aside"
    unknown = SparseVLM(layers=(3,), version="1.0", tokens=64)
    assert [s["tokens"] for s in schedule(Stages([LVLMCSP(), unknown]))] == [144, None, 576, 144]


def test_a_count_that_is_known_when_chosen():
    """And of every later stage: it enters what an earlier one left."""
    stages = schedule(SparseVLM(layers=(3, 7), version="1.0", tokens=64))
    assert [stage["tokens"] for stage in stages] == [None, None]
    stages = schedule(Stages([SparseVLM(layers=(3,), version="1.0", tokens=64), RandomDeep()]))
    assert [stage["tokens"] for stage in stages] == [None, None]
    shown = cli("list", "sparsevlm:layers=3,version=1.0,tokens=64").stdout
    assert "known when chosen" in shown and "mean over" not in shown


def test_what_a_stage_reads_and_how_it_runs():
    first, second = schedule(VScan())
    assert first["reads"].startswith("query and key of vision layer -2, 5")
    assert first["runs"] == "chooses by itself"
    assert (
        second["reads"] == "query (the last row) and keys of its own layer" and second["runs"] == "one pass"
    )
    assert schedule(FastV(rows="mean"))[0]["reads"] == "query (all rows) and keys of the layer before"
    assert schedule(RandomDeep())[0]["reads"] == "positions only"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_setting_of_ours_is_documented(name):
    docs = settings_docs(BUILT_IN[name])
    assert all(docs.get(field) for field in fields_of(BUILT_IN[name]))


def test_settings_and_how_it_was_checked_are_shown(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = cli("list", "fastv").stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    assert ["rows", "last", '"last" (released code) or "mean" over all prompt rows (paper text).'] in rows
    assert ["2", "query (the last row) and keys of the layer before", "one pass"] in rows
    assert "mean over the inputs of 32 layers: 306.0 tokens, 53.1%" in shown
    assert "checked: compared with an independent implementation of the published formula" in shown
    assert "- The paper's text averages the attention received from all tokens; its released code" in shown
    assert "grows as n" in shown and "arXiv 2403.06764" in shown and "fastv:layer=2,keep=30" in shown
    assert "checked: a reading" in cli("list", "cdpruner").stdout
    assert "schedule: as set" in cli("list", "accm").stdout


@dataclass(frozen=True)
class Bare(PruningPolicy):
    layer: int = 2
    keep: int | float = 0.5

    def needs(self, layer):
        return Needs(hidden=True)

    def select(self, ctx):
        return ctx.ordinals


@dataclass(frozen=True)
class Odd(Bare):
    """Another one, compared with nothing.

    Args:
    keep is not indented here.
        layer, keep: both: of them.
            On two lines.

    Raises:
        ValueError: never.
    """

    summary: ClassVar[str] = "nothing"


def test_docstrings_of_others(monkeypatch):
    """One without a docstring, or with one of another shape, is shown with what is known."""
    assert "layer" not in settings_docs(Bare) and "rectify" in settings_docs(Bare)
    assert agreement(Bare) == []
    assert settings_docs(Odd)["keep"] == settings_docs(Odd)["layer"] == "both: of them. On two lines."
    assert agreement(Odd) == ["Another one, compared with nothing."]
    entries = metadata.EntryPoints([metadata.EntryPoint("bare", "mine:Bare", registry.GROUP)])
    monkeypatch.setattr(registry.metadata, "entry_points", lambda group: entries.select(group=group))
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda entry: Bare)
    shown = cli("list", "bare")
    assert shown.exit_code == 0, shown.stderr
    assert "bare (Bare): no summary" in shown.stdout and "checked: names no source" in shown.stdout
    found = listed("bare")["bare"]
    assert found["checked"] == "names no source"
    assert found["schedule"] == [
        {"layer": 2, "reads": "hidden states", "runs": "chooses by itself", "tokens": 288}
    ]
    assert "bare" in listed("--family", "qwen2_vl") and "bare" not in listed("--where", "before")


def test_every_mean_is_that_of_a_preset():
    """A preset for 64 tokens of 576 leaves that many in the schedule that is shown."""
    for name in ("fastv", "divprune", "vscan"):
        found = listed(f"{name}:{BUILT_IN[name].presets[64]}")
        (policy,) = found.values()
        assert policy["mean_tokens"] == pytest.approx(64, abs=0.5)
    assert Feather().packs is False

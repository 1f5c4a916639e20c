"""``check_model``: passes where the wiring is right (every family: tests/models/test_families.py), fails where it is not."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import vlmprune
from helpers import fake_flash
from helpers.families import CASES, build
from vlmprune.cli import logs
from vlmprune.errors import InputError, ModelError
from vlmprune.models import fused, layer_inputs, stage
from vlmprune.models.prompt import Prompt
from vlmprune.policies.base import PruningPolicy
from vlmprune.testing import check_model, model_report
from vlmprune.testing.masked import masked_logits
from vlmprune.testing.pictures import make_inputs
from vlmprune.testing.words import Words

COMPARED = ("unpruned", "keep all", "Random", "Stages", "Rewritten")


@pytest.fixture
def model():
    return build(CASES["llava-llama"])


def failed(report):
    """Batch and first words of the rows that failed."""
    return {(row.batch, row.compared.split(" at ")[0].split(" with ")[0]) for row in report.rows if row.fault}


def everywhere(*names):
    return {(batch, name) for batch in ("prompt", "batch") for name in names}


def test_a_copy_that_no_installer_knows_has_a_version(monkeypatch):
    def version_of_others(name):
        if name == "vlmprune":
            raise PackageNotFoundError(name)
        return version(name)

    for module in (model_report, logs):
        monkeypatch.setattr(module, "version", version_of_others)
        assert module.versions()["vlmprune"] == vlmprune.__version__


def test_says_what_it_compared_and_with_what(model):
    report = check_model(model)
    assert report.ok
    assert [row.compared.startswith(name) for row, name in zip(report.rows, COMPARED * 2, strict=True)] == [
        True
    ] * 10
    assert {row.batch: row.tokens for row in report.rows} == {"prompt": 4, "batch": 12}
    assert report.versions["torch"] == version("torch")
    assert report.versions["transformers"] == version("transformers")
    text = str(report).splitlines()
    assert text[0].startswith("LlavaForConditionalGeneration, sdpa attention, float32 on cpu; vlmprune ")
    assert len(text) == 13 and all(line.startswith("ok") for line in text[2:])
    measured, kept, drawn = report.rows[:3]
    assert 0 < measured.difference < 1e-4 and measured.allowed is None
    assert kept.difference == kept.allowed == 0
    assert drawn.difference <= drawn.allowed < 5e-4  # a few times what was measured
    data = json.loads(json.dumps(report.as_dict()))
    assert data["ok"] and data["rows"][2]["difference"] == drawn.difference


@pytest.mark.parametrize("attention", ["eager", "vlmprune", "flash_attention_2"])
def test_every_attention_implementation(model, attention, monkeypatch):
    calls = fake_flash.install_for_transformers(monkeypatch)
    model.config.text_config._attn_implementation = attention
    report = check_model(model)
    assert report.attention == attention == model.model.language_model.config._attn_implementation
    assert bool(calls) == (attention == "flash_attention_2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_a_tolerance_of_its_own(model, dtype):
    report = check_model(model.to(dtype))
    assert report.rows[2].allowed > 50 * torch.finfo(dtype).eps


# Wirings that are wrong, each in its own way.


def flipped(self, ranking, *rest, right=fused.Passes.__call__):
    """The worst tokens stay where the record says the best ones."""
    _, numbers, _ = right(self, ranking, *rest)
    short, _, made = right(self, replace(ranking, scores=-ranking.scored()), *rest)
    return short, numbers, made


def test_finds_other_columns_dropped_than_recorded(model, monkeypatch):
    monkeypatch.setattr(fused.Passes, "__call__", flipped)
    assert failed(check_model(model, strict=False)) == everywhere("Random", "Stages")


def test_finds_a_choice_that_is_not_the_policys(model, monkeypatch):
    def fewer(self, ranking, *rest, right=fused.Passes.__call__):
        keep = tuple(max(k - 1, min(k, 1)) for k in ranking.keep)
        return right(self, replace(ranking, keep=keep), *rest)

    monkeypatch.setattr(fused.Passes, "__call__", fewer)
    report = check_model(model, vlmprune.Random(3), strict=False)
    (row,) = (row for row in report.rows if row.batch == "prompt" and row.compared.startswith("Random"))
    assert row.fault == "the runs differ"


def test_words_cannot_be_checked_with_a_mask(model):
    words = vlmprune.ACCM(
        vlmprune.Uniform(layer=0), lambda images, k: ["w7"] * len(images), 0.5, tokenizer=Words()
    )
    with pytest.raises(vlmprune.InputError, match="policy: expected one without words"):
        check_model(model, words)


def test_finds_a_record_of_other_tokens(model, monkeypatch):
    def record(self, layer, layout, index, after, path, right=Prompt.record):
        if index is not None:
            index = index.roll(1, 0) if len(index) > 1 else index.fliplr()[:, 1:]
        right(self, layer, layout, index, after, path)

    monkeypatch.setattr(Prompt, "record", record)
    report = check_model(model, vlmprune.Random(3), strict=False)
    assert [row.fault for row in report.rows if row.compared.startswith("Random")] == [
        "the run recorded other tokens at layer 3 than the policy kept"
    ] * 2


def test_finds_a_decode_mask_that_ignores_holes(model, monkeypatch):
    def open_mask(config, hidden, valid, *rest, right=layer_inputs.pruned_mask, **more):
        return right(config, hidden, None if hidden.shape[1] == 1 else valid, *rest, **more)

    monkeypatch.setattr(layer_inputs, "pruned_mask", open_mask)
    found = failed(check_model(model, strict=False))
    assert found == {
        ("batch", name) for name in ("Random", "Stages", "Rewritten")
    }  # alone there are no holes


def test_finds_rotary_positions_of_other_tokens(model, monkeypatch):
    def rolled(self, ranking, *rest, right=fused.Passes.__call__):
        short, numbers, made = right(self, ranking, *rest)
        return short, numbers, made._replace(rope=tuple(x.roll(1, 1) for x in made.rope))

    monkeypatch.setattr(fused.Passes, "__call__", rolled)
    assert failed(check_model(model, strict=False)) == everywhere("Random", "Stages")


def test_finds_packed_positions_forgotten_in_decoding(model, monkeypatch):
    monkeypatch.setattr(layer_inputs, "add_shift", lambda old, *_: old)
    assert failed(check_model(model, strict=False)) == everywhere("Rewritten")


def test_finds_keep_all_off_by_a_bit(model, monkeypatch):
    def nudged(self, forward, i, hidden, *rest, right=stage.StageRunner.__call__):
        return right(self, forward, i, hidden.mul_(1 + 2**-22), *rest)

    monkeypatch.setattr(stage.StageRunner, "__call__", nudged)
    assert failed(check_model(model, strict=False)) == everywhere("keep all")


def test_finds_stages_that_never_ran(model, monkeypatch):
    def skipped(self, prefill, i, hidden, *rest):
        prefill.decisions[i] = None
        return hidden

    monkeypatch.setattr(stage.StageRunner, "__call__", skipped)
    report = check_model(model, vlmprune.Random(3), strict=False)
    assert [row.fault for row in report.rows if row.compared.startswith("Random")] == [
        "the run recorded stages at [], not at [3]"
    ] * 2


def test_finds_logits_that_are_no_numbers(model):
    model.lm_head.weight.data.fill_(torch.nan)
    report = check_model(model, strict=False)
    assert {row.fault for row in report.rows} == {"the logits are not finite"}
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["rows"][0]["difference"] is None


# What it raises, and what it leaves behind.


def test_strict_raises_the_report(model, monkeypatch):
    monkeypatch.setattr(fused.Passes, "__call__", flipped)
    with pytest.raises(AssertionError, match="FAILED: 4 of 10 comparisons"):
        check_model(model)


@dataclass(frozen=True)
class Raises(PruningPolicy):
    error: type[Exception] = ModelError

    @property
    def layers(self):
        return (2,)

    def select(self, ctx):
        raise self.error("cannot")


def test_refusals_are_rows_and_bugs_go_through(model):
    report = check_model(model, Raises(), strict=False)
    assert [row.fault for row in report.rows] == ["", "", "ModelError: cannot"] * 2
    with pytest.raises(KeyError, match="cannot"):
        check_model(model, Raises(KeyError))


def state(model):
    """Everything about a model that a check could leave changed."""
    modules = list(model.modules())
    return (
        [m.training for m in modules],
        [[*m._forward_pre_hooks, *m._forward_hooks] for m in modules],
        [m.config._attn_implementation for m in modules if hasattr(m, "config")],
        [m.__dict__.get("forward") for m in modules],
    )


@pytest.mark.parametrize("broken", [False, True])
def test_leaves_the_model_as_it_was(model, broken, monkeypatch):
    check_model(
        model, Raises(), strict=False
    )  # transformers itself puts hooks into a tower that runs the first time
    model.train()
    model.model.vision_tower.eval()
    before = state(model)
    if broken:
        with pytest.raises(KeyError):
            check_model(model, Raises(KeyError))
        text = model.model.language_model
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(text.norm, "forward", lambda x: 1 / 0)
            inputs, _ = make_inputs(model.config, [CASES["llava-llama"].one])
            masked_logits(model, inputs, torch.zeros(1, 2, dtype=torch.long), {})
    else:
        check_model(model)
    assert state(model) == before


def test_refuses_what_prune_refuses(model):
    run = vlmprune.attach(model, vlmprune.FastV(layer=2))
    with pytest.raises(InputError, match="model: expected no policy attached yet"):
        check_model(model)
    assert run.stages == []
    vlmprune.detach(model)
    with pytest.raises(InputError, match="layer: expected at most 5"):
        check_model(model, vlmprune.FastV(layer=6))
    with pytest.raises(ModelError, match="model: expected"):
        check_model(model.model.language_model)
    with pytest.raises(InputError, match=r"samples: expected prompts that end in words, got \(3, 'wide'\)"):
        check_model(model, samples={"one": [(3, "wide")]})


# A policy of the user's own.


@pytest.mark.parametrize(
    "policy",
    [
        vlmprune.FastV(layer=2, keep=5, earlier_kv="compact"),
        vlmprune.SparseVLM(layers=(1, 3, 4), keep=(10, 6, 3), earlier_kv="compact", positions="pack"),
        vlmprune.VisionZip(dominant=5, contextual=2, positions="pack"),
        vlmprune.FastV(layer=2, keep=1.0),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_policies_that_merge_pack_compact_or_keep_everything(model, policy):
    rows = check_model(model, policy).rows
    assert [row.verdict for row in rows] == ["ok"] * 6
    assert rows[2].compared == f"{type(policy).__name__} at {', '.join(map(str, policy.layers))} with masked"


def test_says_when_rounding_hides_what_pruning_does(model):
    barely = vlmprune.Random(layer=5, keep=15)
    assert check_model(model, barely).ok
    report = check_model(model.to(torch.bfloat16), barely, strict=False)
    assert [row.verdict for row in report.rows] == ["ok", "ok", "unsure"] * 2
    assert report.rows[2].doubt.startswith("pruning itself changes the logits by ")
    assert not report.ok and report.summary == "unsure: nothing could be told; try float32, or keep less"

"""Counts and FLOPs of the report, against hand arithmetic; times are there and consistent."""

from __future__ import annotations

import json

import pytest
import torch

import vlmprune
from helpers.tiny import GRID, LAYERS, generate, make_batch, make_model
from vlmprune.flops import decoder_layer_flops
from vlmprune.models.clock import Clock, Seconds


@pytest.fixture(scope="module")
def model():
    return make_model()


def layer(n: int) -> int:
    return decoder_layer_flops(n, hidden=64, heads=8, kv_heads=4, head_dim=8, intermediate=128)


def test_one_sample_two_stages(model):
    batch = make_batch([[4, "I", 7]])  # 1 + 4 + 16 + 7 = 28 rows
    policy = vlmprune.Stages([vlmprune.Random(layer=1, keep=10), vlmprune.Random(layer=4, keep=3)])
    with vlmprune.prune(model, policy) as run:
        generate(model, batch, 5)
    report = run.report()
    assert [(s.layer, s.tokens_in, s.tokens_kept) for s in run.stages] == [(1, 16, 10), (4, 10, 3)]
    assert report.stages == ((1, 16, 10), (4, 10, 3))
    assert report.visual_tokens == 16
    assert report.tokens.mean_per_layer == pytest.approx((16 + 3 * 10 + 2 * 3) / LAYERS)
    assert report.tokens.after_last_stage == 3
    assert report.tokens.resident_kv == report.tokens.mean_per_layer
    assert report.flops.full == LAYERS * layer(28)
    assert report.flops.pruned == layer(28) + 3 * layer(22) + 2 * layer(15)
    assert report.flops.cut == pytest.approx(1 - report.flops.pruned / report.flops.full)
    assert report.decode_steps == 4


def test_resident_tokens_are_what_the_cache_holds(model):
    batch = make_batch([[4, "I", 7]])
    with vlmprune.prune(model, vlmprune.Random(layer=2, keep=5)) as run:
        _, _, out = generate(model, batch, 1)
    text = 28 - GRID * GRID
    stored = [layer.keys.shape[2] - text for layer in out.past_key_values.layers]
    assert sum(stored) / LAYERS == run.report().tokens.resident_kv


def test_without_cache_nothing_is_resident(model):
    with vlmprune.prune(model, vlmprune.Random(layer=2, keep=5)) as run:
        generate(model, make_batch([["I", 3]]), 1, use_cache=False)
    assert run.report().tokens.resident_kv == 0


def test_ragged_batch_counts_means_and_computed_rows(model):
    batch = make_batch([["I", 9, "I", 4], [3, "I", 5], [12]])  # 46 rows, padded
    with vlmprune.prune(model, vlmprune.Random(layer=3, keep=0.25)) as run:
        generate(model, batch, 2)
    report = run.report()
    assert report.visual_tokens == 16
    assert report.tokens.after_last_stage == 4
    assert report.flops.full == 3 * LAYERS * layer(46)
    assert report.flops.pruned == 3 * (3 * layer(46) + 3 * layer(22))  # 8 of 32 visual tokens + 14 text rows
    assert run.kept(0).shape == (8,) and run.kept(1).shape == (4,) and run.kept(2).shape == (0,)


def test_kept_ordinals_and_positions_agree(model):
    batch = make_batch([["I", 9, "I", 4], [3, "I", 5]])
    with vlmprune.prune(model, vlmprune.Random(layer=3, keep=0.5)) as run:
        generate(model, batch, 1)
    visual = batch["input_ids"] == 199
    for sample in range(2):
        positions = visual[sample].nonzero().flatten()
        index = run.stages[0].index[sample]
        assert torch.equal(positions[run.kept(sample)], index[index >= 0])
    assert run.kept_at(-1, 1).tolist() == list(range(16))
    assert torch.equal(run.kept_at(0, 1), run.kept(1))


def test_errors_name_what_was_asked(model):
    with vlmprune.prune(model, vlmprune.Random(layer=3)) as run:
        generate(model, make_batch([["I", 3]]), 1)
    with pytest.raises(ValueError, match=r"^sample: expected 0\.\.0, got 1$"):
        run.kept(1)
    with pytest.raises(ValueError, match=r"^stage: expected -1\.\.0, got 1$"):
        run.kept_at(1)


def test_times_and_json(model):
    with vlmprune.prune(model, vlmprune.FastV(layer=3)) as run:
        generate(model, make_batch([["I", 3]]), 4)
    seconds = run.report().seconds
    assert 0 < seconds.selection < seconds.prefill
    assert seconds.vision > 0 and seconds.decode > 0
    record = json.loads(json.dumps(run.report().as_dict()))
    assert record["stages"] == [{"layer": 3, "tokens_in": 16, "tokens_kept": 8}]
    assert set(record["tokens"]) == {"mean_per_layer", "after_last_stage", "resident_kv"}
    assert 0 < record["flops"]["cut"] < 1


def test_a_new_prefill_starts_afresh(model):
    with vlmprune.prune(model, vlmprune.FastV(layer=3, keep=4)) as run:
        generate(model, make_batch([["I", 3], ["I", 5]]), 2)
        generate(model, make_batch([[2, "I", 3]]), 3)
        assert len(run.stages) == 1 and run.stages[0].index.shape == (1, 4)
        assert run.report().decode_steps == 2
        generate(model, make_batch([[5]]), 1)
    assert run.stages == [] and run.report().visual_tokens == 0
    assert run.report().seconds.vision == 0


def test_before_any_call(model):
    with vlmprune.prune(model, vlmprune.FastV(layer=3)) as run:
        pass
    report = run.report()
    assert run.kept().tolist() == [] and report.flops.full == 0 and report.flops.cut == 0


def test_a_captured_prefill_has_no_times(monkeypatch):
    """While a CUDA graph is captured nothing runs: its marks are None, and nobody waits for them."""
    clock = Clock(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    marks = clock.begin()
    marks.step_starts(clock.now())
    with clock.selection(2):
        marks.step_ends(clock.now())
    assert marks.seconds() == Seconds(0.0, 0.0, 0.0, 0.0)

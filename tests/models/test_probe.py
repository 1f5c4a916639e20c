"""Scores read through the wiring equal what the layer's own attention would show."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from helpers.tiny import IMAGE, make_batch, make_model
from vlmprune import ops
from vlmprune.policies.base import Needs

BATCHES = {"one": [[4, "I", 7]], "padded": [["I", 9, "I", 4], [3, "I", 5], [12]]}


class Spy(vlmprune.Random):
    """Keeps the context it was shown."""

    rows = "last"

    def needs(self, layer):
        return Needs(hidden=True, attention="previous", rows=self.rows)

    def select(self, ctx):
        type(self).seen.append(ctx)
        return super().select(ctx)


def spy(model, batch, layers=(2,), rows="last", **kwargs):
    cls = type("Spied", (Spy,), {"seen": [], "rows": rows})
    with torch.no_grad(), vlmprune.prune(model, vlmprune.Stages([cls(layer=k, keep=0.5) for k in layers])):
        model(**batch, **kwargs)
    return cls.seen


@pytest.mark.parametrize("attn", ["sdpa", "eager", "vlmprune"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("specs", BATCHES.values(), ids=BATCHES)
def test_last_row_equals_eager_attention(specs, pad, use_cache, attn):
    model, eager = make_model(attn=attn), make_model(attn="eager")
    batch = make_batch(specs, pad=pad)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    (ctx,) = spy(model, batch, use_cache=use_cache, position_ids=positions)
    a = ctx.attention
    got = ops.received_attention(
        a.query, a.key, rows=a.last, columns=a.columns, key_mask=a.key_mask, scale=a.scale
    )
    with torch.no_grad():
        weights = eager(**batch, position_ids=positions, output_attentions=True).attentions[1].mean(1)
    real, visual = batch["attention_mask"], batch["input_ids"] == IMAGE
    for b in range(len(real)):
        last = real[b].nonzero().max()
        want = weights[b, last, visual[b]]
        torch.testing.assert_close(got[b, : len(want)], want, atol=1e-6, rtol=1e-5)
        assert ctx.positions[b][ctx.mask[b]].tolist() == visual[b].nonzero().flatten().tolist()


@pytest.mark.parametrize("specs", BATCHES.values(), ids=BATCHES)
def test_all_rows_equal_eager_attention(specs):
    model, batch = make_model(), make_batch(specs)
    (ctx,) = spy(model, batch, rows="all")
    a = ctx.attention
    got = ops.received_attention(
        a.query, a.key, rows=a.rows, columns=a.columns, key_mask=a.key_mask, scale=a.scale
    )
    with torch.no_grad():
        weights = make_model(attn="eager")(**batch, output_attentions=True).attentions[1].mean(1)
    real, visual = batch["attention_mask"].bool(), batch["input_ids"] == IMAGE
    for b in range(len(real)):
        want = weights[b][real[b]][:, visual[b]].mean(0)
        torch.testing.assert_close(got[b, : len(want)], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_rope_free_scores_equal_scores_from_raw_projections(use_cache):
    """Un-rotating query and keys gives what the layer's projections give before RoPE, as FEATHER computes it."""
    model, batch = make_model(), make_batch(BATCHES["padded"])
    attn = model.model.language_model.layers[1].self_attn
    raw = {}
    handles = [
        attn.q_proj.register_forward_hook(lambda m, i, o: raw.setdefault("q", o)),
        attn.k_proj.register_forward_hook(lambda m, i, o: raw.setdefault("k", o)),
    ]
    (ctx,) = spy(model, batch, use_cache=use_cache)
    [h.remove() for h in handles]
    a = ctx.attention.chunk()
    got = ops.received_attention(
        a.query,
        a.key,
        rows=a.last,
        columns=a.columns,
        key_mask=a.key_mask,
        scale=a.scale,
        normalize="columns",
        rope=a.rope,
    )
    q = raw["q"].unflatten(-1, (8, 8)).transpose(1, 2)[:, :, -1]
    k = raw["k"].unflatten(-1, (4, 8)).transpose(1, 2).repeat_interleave(2, 1)
    visual = batch["input_ids"] == IMAGE
    for b in range(3):
        logits = torch.einsum("hd,hnd->hn", q[b], k[b][:, visual[b]]) * 8**-0.5
        want = logits.softmax(-1).mean(0) if visual[b].any() else logits.mean(0)
        torch.testing.assert_close(got[b, : len(want)], want, atol=1e-6, rtol=1e-5)


def test_context_at_a_later_stage():
    """Ordinals, positions and hidden states of the second stage describe the survivors of the first."""
    model, batch = make_model(), make_batch(BATCHES["padded"])
    first, second = spy(model, batch, layers=(2, 4))
    assert first.counts == (32, 16, 0)
    assert second.counts == (16, 8, 0)
    assert first.grids == second.grids == (((4, 4), (4, 4)), ((4, 4),), ())
    visual = (batch["input_ids"] == IMAGE).nonzero()
    for b, n in enumerate(second.counts):
        positions = visual[visual[:, 0] == b, 1]
        assert torch.equal(second.positions[b, :n], positions[second.ordinals[b, :n]])
    assert second.hidden.shape == (3, 16, 64)
    assert (second.hidden[2] == 0).all()  # padding gathers zeros
    assert second.attention.key.shape[2] < first.attention.key.shape[2]
    columns = second.attention.columns
    assert (columns[second.mask] < second.attention.key.shape[2]).all()


def test_only_what_is_needed_is_computed():
    model, batch = make_model(), make_batch(BATCHES["one"])
    seen = []
    policy = vlmprune.Custom(2, lambda ctx: seen.append(ctx) or torch.arange(3)[None])
    with torch.no_grad(), vlmprune.prune(model, policy):
        model(**batch)
    calls = []
    handle = model.model.language_model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda m, i, o: calls.append(o.shape[1])
    )
    with torch.no_grad(), vlmprune.prune(model, vlmprune.FastV(layer=2)):
        model(**batch)
    handle.remove()
    assert calls == [28, 1]  # the layer's own projection, then one row for the score

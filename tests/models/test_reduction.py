"""Policies that merge, reorder or renumber tokens, against a slow run that recomputes everything at full length."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import vlmprune
from helpers.tiny import IMAGE, TOLERANCE, generate, make_batch, make_model, slow, upstream
from vlmprune.policies import Needs, PruningPolicy, Reduction, TokenContext, keep_count

STEPS = 4
BATCHES = {
    "one": [[4, "I", 7]],
    "two-images": [[2, "I", 3, "I", 5]],
    "padded": [["I", 9, "I", 4], [3, "I", 5], [12]],
    "equal": [[4, "I", 7], [5, "I", 6]],
}


@dataclass(frozen=True)
class Reshape(PruningPolicy):
    """Drops, shuffles and rewrites tokens at random; remembers what it said."""

    at: tuple[int, ...] = (2,)
    positions: str = "pack"
    shuffle: bool = True
    rewrite: bool = True
    said: tuple = field(default=(), repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.at

    def needs(self, layer: int) -> Needs:
        return Needs(hidden=True)

    def select(self, ctx: TokenContext) -> Reduction:
        g = torch.Generator().manual_seed(ctx.layer)
        kept = [keep_count(0.4, n) for n in ctx.counts]
        index = torch.full((len(kept), max(kept)), -1)
        for row, n, k in zip(index, ctx.counts, kept, strict=True):
            order = torch.randperm(n, generator=g)[:k]
            row[:k] = order if self.shuffle else order.sort().values
        rows = torch.randn(*index.shape, ctx.hidden.shape[2], generator=g) if self.rewrite else None
        self.said[0][ctx.layer] = (index, rows, ctx, self.positions)
        return Reduction(index, rows, self.positions)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return make_model(attn=request.param)


def compare(model, batch, policy, **kwargs):
    with vlmprune.prune(model, policy) as run:
        tokens, logits, out = generate(model, batch, STEPS, **kwargs)
    want_tokens, want_logits = slow(model, batch, policy.said[0], STEPS)
    torch.testing.assert_close(logits, want_logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)
    return run, out


@pytest.mark.parametrize("positions", ["keep", "pack"])
@pytest.mark.parametrize(
    "model, shuffle, rewrite",
    [("sdpa", False, False), ("sdpa", True, False), ("sdpa", True, True), ("eager", True, True)],
    indirect=["model"],
)
@pytest.mark.parametrize("layers", [(0,), (2,), (1, 4)], ids=str)
@pytest.mark.parametrize("specs", BATCHES.values(), ids=BATCHES)
def test_reductions(model, specs, layers, shuffle, rewrite, positions):
    policy = Reshape(layers, positions, shuffle, rewrite, ({},))
    run, _ = compare(model, make_batch(specs), policy)
    assert [stage.layer for stage in run.stages] == list(layers)
    for stage in run.stages:
        index, _, ctx, _ = policy.said[0][stage.layer]
        for b in range(len(index)):
            said = ctx.ordinals[b, index[b][index[b] >= 0]]
            kept = stage.ordinals[b]
            assert sorted(said.tolist()) == kept[kept >= 0].tolist()


@pytest.mark.parametrize("positions", ["keep", "pack"])
def test_without_cache(model, positions):
    compare(
        model, make_batch(BATCHES["padded"]), Reshape((2,), positions, True, True, ({},)), use_cache=False
    )


@pytest.mark.parametrize("specs", ["one", "padded"])
def test_second_turn_continues_from_packed_positions(model, specs):
    batch = make_batch(BATCHES[specs])
    policy = Reshape((1, 4), "pack", True, True, ({},))
    with vlmprune.prune(model, policy):
        _, _, first = generate(model, batch, STEPS)
        new = torch.randint(3, 198, (len(first.sequences), 5), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([first.sequences, new], 1)
        grown = ids.shape[1] - batch["attention_mask"].shape[1]
        real = torch.cat([batch["attention_mask"], batch["attention_mask"].new_ones(len(ids), grown)], 1)
        again = {"input_ids": ids, "attention_mask": real}
        tokens, logits, _ = generate(model, again, STEPS, past_key_values=first.past_key_values)
    again["pixel_values"] = batch["pixel_values"]
    want_tokens, want_logits = slow(model, again, policy.said[0], STEPS)
    torch.testing.assert_close(logits, want_logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)


def test_packing_at_layer_0_equals_a_really_shorter_prompt(model):
    """What pre-LLM methods do in their own code: fewer embeddings in, nothing else."""
    batch = make_batch(BATCHES["one"])
    policy = Reshape((0,), "pack", False, False, ({},))
    with vlmprune.prune(model, policy) as run:
        tokens, logits, _ = generate(model, batch, STEPS)
    with torch.no_grad():
        features = model.get_image_features(pixel_values=batch["pixel_values"])
        features = features.pooler_output[0] if hasattr(features, "pooler_output") else features[0]
        embeds = model.get_input_embeddings()(batch["input_ids"])
        embeds[batch["input_ids"] == IMAGE] = features
        stay = batch["input_ids"][0] != IMAGE
        stay[run.stages[0].index[0]] = True
        out = model.generate(
            inputs_embeds=embeds[:, stay],
            attention_mask=batch["attention_mask"][:, stay],
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            suppress_tokens=[IMAGE],
        )
    torch.testing.assert_close(logits, torch.stack(out.logits, 1), atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, out.sequences)


def test_wrong_rows_are_named(model):
    class Odd(Reshape):
        def select(self, ctx: TokenContext) -> Reduction:
            return Reduction(torch.tensor([[0, 1]]), torch.zeros(1, 3, 64))

    message = r"^.*Odd.*select\(ctx\)\.hidden: expected \[1, 2, 64\], got \[1, 3, 64\]$"
    with pytest.raises(ValueError, match=message), vlmprune.prune(model, Odd((2,))):
        generate(model, make_batch(BATCHES["one"]), 1)


def test_union_refuses_a_policy_that_changes_tokens(model):
    policy = Reshape((2,), "keep", True, True, ({},)) | vlmprune.Uniform(layer=2)
    with pytest.raises(ValueError, match=r"^union: expected policies that only drop tokens, got Reshape"):
        with vlmprune.prune(model, policy):
            generate(model, make_batch(BATCHES["one"]), 1)


# What policies may read


def contexts(model, batch, **needs) -> list[TokenContext]:
    seen: list[TokenContext] = []

    class Reader(vlmprune.Random):
        def needs(self, layer: int) -> Needs:
            return Needs(**needs)

        def select(self, ctx: TokenContext) -> Tensor:
            seen.append(ctx)
            return super().select(ctx)

    with torch.no_grad(), vlmprune.prune(model, vlmprune.Stages([Reader(layer=1), Reader(layer=3)])):
        model(**batch)
    return seen


@pytest.mark.parametrize("specs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_text_rows_and_embeddings(model, specs, pad):
    batch = make_batch(specs, pad=pad)
    first, second = contexts(model, batch, attention="previous", rows="text", embeds=True)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    for b in range(len(ids)):
        visual = (ids[b] == IMAGE).nonzero().flatten()
        after = int(visual.max()) + 1 if len(visual) else ids.shape[1]
        want = [j for j in range(after, ids.shape[1]) if real[b, j]]
        for ctx in (first, second):
            assert [j for j in ctx.text[b].tolist() if j >= 0] == want
            assert (ctx.attention.rows[b] >= 0).sum() == len(want)
    text = ids != IMAGE
    for ctx in (first, second):
        assert [sorted(j for j in row if j >= 0) for row in ctx.image.tolist()] == [
            (row == IMAGE).nonzero().flatten().tolist() for row in ids
        ]
    assert torch.equal(first.embeds[text], model.get_input_embeddings()(ids)[text])


@pytest.mark.parametrize("pad", ["left", "right"])
def test_text_row_scores_equal_eager_attention(pad):
    model, eager = make_model(), make_model(attn="eager")
    batch = make_batch(BATCHES["padded"], pad=pad)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    seen = []

    class Reader(vlmprune.Random):
        def needs(self, layer: int) -> Needs:
            return Needs(attention="previous", rows="text")

        def select(self, ctx: TokenContext) -> Tensor:
            seen.append(ctx)
            return super().select(ctx)

    with torch.no_grad():
        with vlmprune.prune(model, Reader(layer=2)):
            model(**batch, position_ids=positions)
        weights = eager(**batch, position_ids=positions, output_attentions=True).attentions[1].mean(1)
    a = seen[0].attention
    got = vlmprune.ops.received_attention(
        a.query, a.key, rows=a.rows, columns=a.columns, key_mask=a.key_mask, scale=a.scale
    )
    for b in range(2):
        visual = batch["input_ids"][b] == IMAGE
        text = [j for j in seen[0].text[b].tolist() if j >= 0]
        want = weights[b][text][:, visual].mean(0)
        torch.testing.assert_close(got[b, : len(want)], want, atol=1e-6, rtol=1e-5)
    assert (got[2] == 0).all()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("specs", ["one", "padded"])
def test_own_attention_is_what_the_layer_itself_will_see(specs, use_cache):
    """Read at layer K before it runs, with nothing dropped yet: equals layer K's eager attention."""
    model, eager = make_model(), make_model(attn="eager")
    batch, seen = make_batch(BATCHES[specs]), []
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    class Reader(vlmprune.Random):
        def needs(self, layer: int) -> Needs:
            return Needs(attention="own", rows="last")

        def select(self, ctx: TokenContext) -> Tensor:
            seen.append(ctx)
            return super().select(ctx)

    with torch.no_grad():
        with vlmprune.prune(model, Reader(layer=2, keep=1.0)):
            model(**batch, position_ids=positions, use_cache=use_cache)
        weights = eager(**batch, position_ids=positions, output_attentions=True).attentions[2].mean(1)
    a = seen[0].attention
    got = vlmprune.ops.received_attention(
        a.query, a.key, rows=a.rows, columns=a.columns, key_mask=a.key_mask, scale=a.scale
    )
    for b in range(len(got)):
        want = weights[b, -1, batch["input_ids"][b] == IMAGE]
        torch.testing.assert_close(got[b, : len(want)], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_vision_attention_equals_the_tower_s_own(tower):
    model = make_model(tower=tower)
    model.set_attn_implementation("eager")
    batch = make_batch(BATCHES["padded"])
    first, second = contexts(model, batch, vision=(-2, 0))
    for layer in (-2, 0):
        v = first.vision[layer]
        assert v.cls == (tower == "clip") and v.query.shape[0] == 3
        with torch.no_grad():
            out = model.model.vision_tower(
                batch["pixel_values"], output_attentions=True, output_hidden_states=True
            )
        weights = (v.query @ v.key.transpose(2, 3) * v.scale).softmax(-1)
        torch.testing.assert_close(weights, out.attentions[layer], atol=1e-5, rtol=1e-4)
    want = out.hidden_states[-2]
    torch.testing.assert_close(first.features, want[:, 1:] if tower == "clip" else want)
    assert second.vision[-2].query is not None


@upstream("takes no features encoded ahead")
def test_vision_of_another_call_is_refused(model):
    """Features encoded outside the scope leave no query and key behind."""
    batch = make_batch(BATCHES["one"])
    needs = Needs(vision=(-2,))

    class Reader(vlmprune.Random):
        def needs(self, layer: int) -> Needs:
            return needs

    from vlmprune.errors import ModelError

    with torch.no_grad(), vlmprune.prune(model, Reader(layer=1)):
        model(**batch)
        twice = {k: torch.cat([v, v]) for k, v in batch.items()}
        model.model.vision_tower.forward(
            twice["pixel_values"]
        )  # bypasses nothing we hook, but is no call of ours
        with pytest.raises(
            ModelError, match=r"^vision: expected query and key of the 1 crops of this call, got none"
        ):
            features = model.get_image_features(pixel_values=twice["pixel_values"])
            embeds = model.get_input_embeddings()(batch["input_ids"])
            first = features.pooler_output[:1] if hasattr(features, "pooler_output") else features[:1]
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=first)},
            )
            assert embeds is not None


def test_vision_layer_out_of_range(model):
    class Reader(vlmprune.Random):
        def needs(self, layer: int) -> Needs:
            return Needs(vision=(7,))

    with pytest.raises(ValueError, match=r"^vision layer: expected -3\.\.2, got 7$"):
        vlmprune.attach(model, Reader(layer=1))

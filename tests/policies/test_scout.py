"""Scout: the spread of scores against loops, what each stage keeps, budgets, and how it is written."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vlmprune.errors import InputError
from vlmprune.flops import DecoderShape, decoder_flops, prefill_flops, visual_inputs
from vlmprune.policies import (
    CDPruner,
    Custom,
    DivPrune,
    FastV,
    Random,
    Scout,
    Uniform,
    VisionZip,
    policy_from,
)
from vlmprune.policies.parts.blur import blurred
from vlmprune.policies.parts.joining import apart
from vlmprune.policies.schedule import keep_for_flops, keep_for_mean_tokens, stage_counts, wave_rows
from vlmprune.testing.context import make_context

SHAPE = DecoderShape(layers=8, hidden=256, heads=8, kv_heads=8, head_dim=32, intermediate=704)
GRIDS = (((4, 5), (2, 7)), (), ((6, 3),))
SCOUT = Scout(coarse=Uniform(layer=0, keep=72), fine=48, look=5, by="attention")


def spread_by_loops(scores, ordinals, grids, spread, tokens):
    out = torch.zeros(len(scores), tokens, dtype=torch.float64)
    for b, own in enumerate(grids):
        places = [(g, r, c) for g, (rows, cols) in enumerate(own) for r in range(rows) for c in range(cols)]
        for token, (g, r, c) in enumerate(places):
            for score, number in zip(scores[b].tolist(), ordinals[b].tolist(), strict=True):
                if number >= 0 and places[number][0] == g:
                    far = (places[number][1] - r) ** 2 + (places[number][2] - c) ** 2
                    out[b, token] += score * math.exp(-far / (2 * spread**2))
    return out.float()


@pytest.mark.parametrize("spread", [0.25, 1.0, 3.0, 1000.0])
def test_spread_equals_loops(spread):
    g = torch.Generator().manual_seed(0)
    ordinals = torch.tensor([[0, 3, 11, 19, 20, 33], [-1] * 6, [2, 8, 17, -1, -1, -1]])
    scores = torch.rand(3, 6, generator=g)  # what stands at padding is never read
    got = blurred(scores, ordinals, GRIDS, spread, 34)
    want = spread_by_loops(scores, ordinals, GRIDS, spread, 34)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[2, :18], want[2, :18])


@pytest.mark.parametrize("rope", [True, False])
def test_keeps_what_ran_and_the_best_of_the_others(rope):
    policy = Scout(coarse=Uniform(layer=0, keep=0.2), fine=0.25, look=3, by="attention", rope=rope)
    ctx = make_context(policy.needs(3), [[(4, 5)], [], [(5, 4), (2, 10)]], 3)
    index = policy.select(ctx)
    how = {} if rope else {"normalize": "columns", "unrotated": True}
    seen = ctx.attention if rope else ctx.attention.chunk()
    received = seen.received(seen.last, **how)
    scores = spread_by_loops(received, ctx.ran, ctx.grids, 1.0, 40)
    for b, n in enumerate(ctx.counts):
        ran = {number for number in ctx.ran[b].tolist() if number >= 0}
        others = [number for number in range(n) if number not in ran]
        best = sorted(others, key=lambda number: (-float(scores[b, number]), number))
        want = ran | {*best[: policy.kept(n, 2, 3) - len(ran)]} if n else set()
        assert {number for number in index[b].tolist() if number >= 0} == want


def dpp_by_determinants(features, relevance, there, more):
    """The tokens that, one after another, multiply the kernel's determinant most."""
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    kernel = relevance.double()[:, None] * (unit @ unit.T) * relevance.double()
    chosen = list(there)
    for _ in range(more):
        others = [i for i in range(len(kernel)) if i not in chosen]
        grown = [torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]) for i in others]
        chosen.append(others[int(torch.stack(grown).argmax())])
    return chosen[len(there) :]


def test_fine_tokens_are_unlike_the_coarse_ones_and_one_another():
    """Against determinants; by attention alone, or without it, they would be others."""
    policy = Scout(coarse=Uniform(layer=0, keep=4), fine=3, look=3)
    differ = {"attention alone": 0, "no attention": 0}
    for seed in range(5):
        ctx = make_context(policy.needs(3), [[(4, 5)]], 3, seed=seed)
        coarse, features = ctx.ran[0].tolist(), ctx.embeds[0, ctx.image[0]]
        worth = blurred(ctx.attention.received(ctx.attention.last), ctx.ran, ctx.grids, 1.0, 20)[0]
        wanted = dpp_by_determinants(features, worth.index_fill(0, ctx.ran[0], 1.0), coarse, 3)
        assert set(policy.select(ctx)[0].tolist()) == {*coarse, *wanted}
        by_attention = replace(policy, by="attention").select(ctx)[0].tolist()
        evenly = dpp_by_determinants(features, torch.ones(20), coarse, 3)
        differ["attention alone"] += set(by_attention) != {*coarse, *wanted}
        differ["no attention"] += set(evenly) != set(wanted)
    assert all(differ.values()), differ


def test_a_coarse_token_that_others_span_takes_nobodys_place():
    features = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    features[0, 1] = features[0, 0]  # two coarse tokens that are one
    features[0, 4] = 2 * features[0, 0]  # and one that would show nothing new, whatever it is worth
    there = torch.tensor([[True, True, False, False, False, False, False, False]])
    scores = torch.rand(1, 8, generator=torch.Generator().manual_seed(1)).index_fill(1, torch.tensor(4), 1.0)
    mask = torch.tensor([[True] * 7 + [False]])
    ranks = apart(scores, features, there, mask, 5)
    assert ranks[0].argsort()[-4:].tolist().count(4) == 0
    best = ranks[0].topk(3).indices.tolist()
    own = scores[0]
    assert best == dpp_by_determinants(features[0, :7], own[:7].index_fill(0, torch.tensor(0), 1.0), [0], 3)
    assert (ranks[0, [0, 1, 7]] == 0).all() and (ranks[0] > 0).sum() <= 4


def test_where_nothing_new_is_left_attention_decides():
    """More tokens than the features have dims: the others are the most attended, not the first; NaN is worth nothing."""
    features = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(0))
    there = torch.zeros(1, 12, dtype=torch.bool).index_fill(1, torch.tensor([0, 1, 2]), True)
    scores = torch.arange(12.0)[None]
    mask = torch.ones_like(there)
    assert apart(scores, features, there, mask, 7)[0].topk(4).indices.sort().values.tolist() == [8, 9, 10, 11]
    scores[0, 11] = float("nan")
    assert apart(scores, features, there, mask, 7)[0].topk(4).indices.sort().values.tolist() == [7, 8, 9, 10]
    alike = torch.ones(1, 12, 3)
    assert apart(scores, alike, there, mask, 7)[0].topk(4).indices.sort().values.tolist() == [7, 8, 9, 10]


def test_as_many_join_where_images_differ_in_size():
    coarse = CDPruner(keep=8, spend="image", relevance="none")
    policy = Scout(coarse=coarse, fine=3, look=3)
    ctx = make_context(policy.needs(3), [[(2, 2), (6, 6)]], 3)
    assert policy.select(ctx).shape == (1, 4 + 8 + 3)


def test_random_reads_nothing():
    policy = replace(SCOUT, by="random")
    assert (
        policy.needs(5).attention is None
        and not policy.needs(5).embeds
        and SCOUT.needs(5).attention == "previous"
    )
    ctx = make_context(policy.needs(5), [[(5, 4)]], 5)
    assert policy.seed == 0 and SCOUT.seed is None  # an evaluation repeats what draws
    one, two = (replace(policy, coarse=Uniform(layer=0, keep=4), fine=5, seed=s).select(ctx) for s in (0, 1))
    assert one.shape == (1, 9) and not torch.equal(one, two)


def test_as_many_join_whatever_the_overlap_of_a_union():
    policy = Scout(coarse=Random(0, keep=6) | Uniform(layer=0, keep=6), fine=3, look=3)
    assert policy.kept(20, 1, 0) == 10 and policy.kept(20, 1, 3) == 13
    ctx = make_context(policy.needs(3), [[(4, 5)]], 3)  # 4 of 20 have run
    assert policy.select(ctx).shape == (1, 7)


def test_no_union_of_two_waves():
    """How many join would depend on what both looked at: what both are to look at goes into ``coarse``."""
    with pytest.raises(InputError, match=r"^first: expected a policy without a second wave, got Scout\("):
        SCOUT | SCOUT
    with pytest.raises(InputError, match=r"^first: expected a policy without a second wave, got Scout\("):
        SCOUT & SCOUT


def test_a_coarse_policy_whose_count_only_its_choice_says():
    policy = Scout(coarse=Custom(0, lambda ctx: torch.tensor([[1, 5]])), fine=3, look=3)
    assert policy.select(make_context(policy.needs(0), [[(4, 5)]], 0)).tolist() == [[1, 5]]
    assert policy.select(make_context(policy.needs(3), [[(4, 5)]], 3)).shape == (1, 7)
    with pytest.raises(InputError, match="Custom: expected a policy that says how many"):
        policy.kept(20, 1, 3)


def test_what_has_run_is_never_dropped():
    policy = Scout(coarse=Random(0, keep=1) | Uniform(layer=0, keep=1), fine=1, look=3)
    ctx = make_context(policy.needs(3), [[(4, 5)]], 3)
    assert set(ctx.ran[0].tolist()) <= set(policy.select(ctx)[0].tolist())


def test_coarse_tokens_keep_their_positions():
    ctx = make_context(Uniform().needs(0), [[(4, 5)]], 0)
    policy = Scout(coarse=DivPrune(keep=5), look=2)
    ctx = make_context(policy.needs(0), [[(4, 5)]], 0)
    assert torch.equal(policy.select(ctx), DivPrune(keep=5, positions="keep").select(ctx))


@pytest.mark.parametrize(
    "text, policy",
    [
        ("scout", Scout()),
        ("scout:coarse=(uniform:layer=0,keep=72),fine=48,look=5,by=attention", SCOUT),
        (
            "scout:fine=24,coarse=(divprune:keep=48,positions=keep | uniform:layer=0,keep=24),spread=2.0",
            Scout(
                coarse=DivPrune(keep=48, positions="keep") | Uniform(layer=0, keep=24), fine=24, spread=2.0
            ),
        ),
        ("scout:by=random,rope=false,seed=3", Scout(by="random", rope=False, seed=3)),
    ],
)
def test_as_typed_and_as_data(text, policy):
    assert policy_from(text) == policy
    assert policy_from(policy.to_dict()) == policy


@pytest.mark.parametrize(
    "policy", [Scout(), SCOUT, Scout(coarse=DivPrune(keep=0.05), fine=16, look=6)], ids=repr
)
@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_at_a_share_both_have_their_part(policy, share):
    part = policy.kept(576, 1, 0) / policy.kept(576, 1, policy.look)
    made = policy.at(share)
    assert abs(made.kept(576, 1, policy.look) - share * 576) <= 2
    assert made.kept(576, 1, 0) == pytest.approx(part * share * 576, abs=1)


def test_at_one_all_are_coarse():
    assert stage_counts(SCOUT.at(1.0), 576) == [(0, 576), (5, 576)]
    assert wave_rows(SCOUT, [(0, 576), (5, 576)], 20) is None


@pytest.mark.parametrize("cut", [0.52, 0.83, 0.94])
def test_a_budget_counts_both_waves(cut):
    """One token more would not meet it."""
    share, text = keep_for_flops(Scout(look=5), cut, SHAPE, 576, 20), 20

    def cut_of(policy):
        c, both = policy.kept(576, 1, 0), policy.kept(576, 1, 5)
        dims = 8, 32
        matrices = 2 * 256 * 8 * 32 * 2 + 3 * 256 * 704

        def layer(rows, keys):
            return 2 * rows * matrices + 4 * rows * keys * dims[0] * dims[1]

        spent = 5 * layer(c + text, c + text) + 5 * layer(both - c + text, both + text)
        return 1 - (spent + 3 * layer(both + text, both + text)) / (8 * layer(576 + text, 576 + text))

    assert cut_of(Scout(look=5).at(share)) >= cut > cut_of(Scout(look=5).at(share + 2 / 576))


def test_mean_tokens_are_those_of_both_waves():
    share = keep_for_mean_tokens(Scout(look=5), 120, layers=8, visual=576)
    assert 118 <= Scout().at(share).kept(576, 1, 5) <= 120
    assert visual_inputs(8, 576, [(0, 72), (5, 120)], (5, 68)) == [120] * 8


def test_the_cost_of_two_waves():
    """That of keeping both from layer 0 on, and the text once more, but for what the first wave does not attend to."""
    stages, text = stage_counts(SCOUT, 576), 20
    assert stages == [(0, 72), (5, 120)] and wave_rows(SCOUT, stages, text) == (5, 68)
    both = prefill_flops(SHAPE, 576, text, stages, (5, 68))
    plain = decoder_flops(SHAPE, [120 + text] * 8)
    again = 5 * decoder_flops(replace(SHAPE, layers=1), [text])
    assert plain < both < plain + 1.1 * again
    assert wave_rows(FastV(), stage_counts(FastV(), 576), text) is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"coarse": 72}, "^coarse: expected a policy, got 72$"),
        ({"coarse": Uniform()}, "^coarse: expected a policy with one stage, at layer 0, got Uniform"),
        ({"coarse": Uniform(layer=0, earlier_kv="compact")}, "^coarse: expected earlier_kv='full'"),
        (
            {"fine": 0},
            r"^fine: expected a share in \(0, 1\] or a whole number of tokens per image >= 1, got 0$",
        ),
        ({"look": 0}, r"^look: expected a whole number >= 1 \(the layers before it look\), got 0$"),
        ({"by": "chance"}, "^by: expected 'attention', 'diverse' or 'random', got 'chance'$"),
        ({"spread": 0.2}, "^spread: expected a number from 0.25 to 1000, got 0.2$"),
        ({"spread": 1e200}, "^spread: expected a number from 0.25 to 1000, got 1e\\+200$"),
        ({"spread": float("nan")}, "^spread: expected a number from 0.25 to 1000, got nan$"),
        ({"rope": 1}, "^rope: expected True or False, got 1$"),
        ({"by": "random", "seed": -1}, "^seed: expected a whole number"),
        ({"seed": 1}, "^seed: expected None where nothing is drawn, got 1$"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Scout(**settings)


def test_a_coarse_policy_that_merges():
    policy = Scout(coarse=VisionZip(dominant=3, contextual=2), look=2)
    ctx = make_context(policy.needs(0), [[(4, 5)]], 0)
    with pytest.raises(InputError, match=r"^coarse: expected a policy that only drops tokens, got VisionZip"):
        policy.select(ctx)


def test_no_room_for_fine_tokens():
    with pytest.raises(InputError, match=r"^fine: expected room for it beside Uniform"):
        Scout(coarse=Uniform(layer=0, keep=1.0)).at(0.5)

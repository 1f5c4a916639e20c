"""VTW against its released code's rule in plain Python, and a prompt that ends with its image."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import kept_lists
from vlmprune.errors import InputError
from vlmprune.flops import DecoderShape, decoder_flops, layer_inputs
from vlmprune.policies import VTW, FastV, Needs, Reduction, Stages, keep_for_flops
from vlmprune.policies.answer import check_ranking, check_selection
from vlmprune.policies.schedule import stage_counts
from vlmprune.testing.context import make_context

BATCH = [[(4, 5)], [], [(5, 4), (2, 10)], [(1, 1)]]


def released(length, first, tokens):
    """Rows that are left of one prompt: those before the image, then those behind it, as VTW's code cuts them."""
    rows = list(range(length))
    return rows[:first] + rows[first + tokens :]


@pytest.mark.parametrize("after", [None, [6, 0, 6, 6], [0, 0, 0, 0]], ids=["text", "mixed", "images last"])
def test_only_a_token_that_ends_its_prompt_stays(after):
    policy = VTW(layer=3)
    ctx = make_context(policy.needs(3), BATCH, 3, after=after)
    ends = [
        n > 0 and after is not None and not more for n, more in zip(ctx.counts, after or [1] * 4, strict=True)
    ]
    index = policy.select(ctx)
    assert kept_lists(index) == [[n - 1] if last else [] for n, last in zip(ctx.counts, ends, strict=True)]
    check_selection(index, ctx, "VTW", empties=True)
    ranking = policy.rank(ctx)
    check_ranking(ranking, ctx, "VTW", empties=True)
    assert ranking.keep == tuple(map(int, ends)) and ranking.extra is None


def test_what_is_left_is_the_released_cut():
    ctx = make_context(VTW().needs(15), [[(4, 5)]], 15, before=7)
    kept = set(VTW().select(ctx)[0].tolist())
    positions = ctx.positions[0].tolist()
    length = max(positions) + 10
    gone = {position for number, position in enumerate(positions) if number not in kept}
    assert [row for row in range(length) if row not in gone] == released(length, positions[0], 20)


def test_in_a_captured_prefill_there_is_text():
    ctx = replace(make_context(VTW().needs(15), [[(4, 5)]], 15, after=[0]), words=None)
    assert kept_lists(VTW().select(ctx)) == [[]]


def test_packed_positions():
    ctx = make_context(Needs(rows="text"), [[(4, 5)]], 15)
    choice = VTW(positions="pack").select(ctx)
    assert isinstance(choice, Reduction) and choice.positions == "pack" and choice.index.shape == (1, 0)


def test_budgets():
    """Of LLaVA-1.5-7B's 576 tokens: fifteen layers of 32 see all, the others none."""
    assert stage_counts(VTW(), 576) == [(15, 0)]
    both = Stages([FastV(layer=2, keep=0.5), VTW(layer=20)])
    assert stage_counts(both, 576) == [(2, 288), (20, 0)]
    assert both.empties(20) and not both.empties(2)
    assert both.at(0.25) == Stages([FastV(layer=2, keep=0.25), VTW(layer=20)])
    shape = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008)
    share = keep_for_flops(both, 0.7, shape, visual=576, text=60)
    lengths = [n + 60 for n in layer_inputs(32, 576, stage_counts(both.at(share), 576))]
    assert 0.7 <= 1 - decoder_flops(shape, lengths) / decoder_flops(shape, [636] * 32) < 0.702
    for policy in (VTW(), Stages([VTW()])):
        with pytest.raises(
            InputError, match=r"^VTW: expected a policy with a share to set, got VTW\(.*layer=15"
        ):
            keep_for_flops(policy, 0.5, shape, visual=576, text=60)


def test_others_must_keep_one():
    ctx = make_context(Needs(), [[(4, 5)], []], 3)
    none = torch.empty(2, 0, dtype=torch.int64)
    check_selection(none, ctx, "P()", empties=True)
    with pytest.raises(
        InputError, match=r"^P\(\)\.select\(ctx\), sample 0: expected at least one of its 20 tokens"
    ):
        check_selection(none, ctx, "P()")
    assert not FastV().empties(2)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(layer=-1), r"^layer: expected a whole number >= 0, got -1$"),
        (dict(layer=1.5), r"^layer: expected a whole number >= 0, got 1\.5$"),
        (dict(positions="gone"), r"^positions: expected 'keep' or 'pack', got 'gone'$"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(InputError, match=message):
        VTW(**settings)

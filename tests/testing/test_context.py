"""The contexts that ship: where tokens stand in a prompt, what is rotated, and what stays of it for given needs."""

from dataclasses import replace

import pytest
import torch

from vlmprune.policies import Needs
from vlmprune.testing.context import lay_out, make_case, make_context, rotate, tables, with_text
from vlmprune.testing.context_changes import broken, copied, first_alone, halved, inputs_of, repeated

EVERYTHING = Needs(hidden=True, attention="previous", rows="text", embeds=True, vision=(-2, 1))


def test_a_prompt():
    """t t t v v t t v t t, with 2 text tokens before, 2 after each image and 1 at the end."""
    made = lay_out([(1, 2), (1, 1)], None, before=3, after=1)
    assert made.origin == list(range(11))
    assert made.image == made.columns == [3, 4, 7]
    assert made.ordinals == [0, 1, 2] and made.text == [8, 9, 10]


def test_a_prompt_after_a_stage():
    made = lay_out([(1, 2), (1, 1)], [1, 2], before=3, after=1)
    assert made.origin == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert made.columns == [3, 6] and made.ordinals == [1, 2]
    assert made.image == [3, 4, 7] and made.text == [8, 9, 10]


def test_a_prompt_that_ends_with_its_image():
    made = lay_out([(1, 2), (1, 1)], None, before=1, after=0)
    assert made.origin == [0, 1, 2, 3, 4, 5] and made.columns == [1, 2, 5] and made.text == []
    assert lay_out([], None, before=1, after=2).text == []


def test_rotation():
    """A pair turns by the angle position * base^(-2f/D)."""
    x = torch.zeros(1, 1, 1, 4)
    x[..., 1] = 1.0  # pairs are (0, 2) and (1, 3)
    cos, sin = tables(torch.tensor([[7]]), 4)
    angle = torch.tensor(7 * 100.0**-0.5)
    turned = torch.tensor([0.0, angle.cos(), 0.0, angle.sin()])
    torch.testing.assert_close(rotate(x, cos, sin)[0, 0, 0], turned)


def test_everything_agrees_about_where_tokens_are():
    """Columns, positions, text rows: a batch padded on the left, behind an earlier turn, after a stage."""
    made = with_text(make_case([[(2, 3)], [(1, 2), (2, 2)]], kept=[[0, 4], None], past=True))
    ctx, past = made.ctx, 4
    seen = ctx.attention
    assert seen.key.shape[2] - seen.query.shape[2] == past
    for sample, count in enumerate(ctx.counts):
        rows = int(made.valid[sample, past:].sum())
        text = ctx.text[sample][ctx.text[sample] >= 0]
        assert seen.rows[sample][seen.rows[sample] >= 0].tolist() == list(
            range(seen.key.shape[2] - len(text), seen.key.shape[2])
        )
        assert seen.last[sample].item() == seen.key.shape[2] - 1
        for n in range(count):
            column = seen.columns[sample, n].item()
            assert made.valid[sample, column]
            expected = tables(ctx.positions[sample, n].view(1, 1) + past, seen.rope[0].shape[2])[0][0, 0]
            torch.testing.assert_close(seen.rope[0][sample, column - past], expected)
        assert (
            ctx.image[sample][ctx.ordinals[sample, :count]].tolist() == ctx.positions[sample, :count].tolist()
        )
        assert rows == seen.query.shape[2] or not made.valid[sample, past]


@pytest.mark.parametrize(
    "needs",
    [
        Needs(),
        Needs(hidden=True),
        Needs(attention="own"),
        Needs(attention="previous", rows="all"),
        Needs(attention="previous", rows="text"),
        Needs(embeds=True),
        Needs(vision=(-2,)),
        EVERYTHING,
    ],
    ids=repr,
)
def test_only_what_is_needed(needs):
    ctx = make_context(needs, [[(2, 3)], [(3, 2)]], 2)
    assert (ctx.hidden is not None) == needs.hidden and (ctx.attention is not None) == bool(needs.attention)
    assert (ctx.embeds is not None) == (ctx.image is not None) == needs.embeds
    assert (ctx.text is not None) == (needs.embeds or needs.rows == "text")
    assert tuple(ctx.vision) == needs.vision
    assert (ctx.features is not None) == (ctx.project is not None) == bool(needs.vision)
    if needs.attention:
        queries = {"last": 1, "text": 7, "all": ctx.attention.key.shape[2]}[needs.rows]
        assert ctx.attention.query.shape[2] == queries
        assert (ctx.attention.rows >= 0).sum(1).tolist() == [{"all": 16}.get(needs.rows, queries)] * 2


def test_no_text_leaves_no_query():
    ctx = make_context(replace(EVERYTHING, vision=()), [[(2, 3)]], 2, after=[0])
    assert ctx.text.shape == ctx.attention.rows.shape == (1, 0) and ctx.attention.query.shape[2] == 0


def test_changes():
    ctx = make_context(EVERYTHING, [[(2, 3)], [(3, 2)], [(6, 1)]], 2)
    assert set(inputs_of(ctx)) == {
        *("hidden", "embeds", "features", "query", "key"),
        *(f"vision[{i}].{x}" for i in (-2, 1) for x in ("query", "key")),
    }
    for name, x in inputs_of(broken(ctx, 1, float("nan"))).items():
        assert x[1].isnan().all() and x[[0, 2]].isfinite().all(), name
    for name in inputs_of(ctx):
        for other, x in inputs_of(broken(ctx, 1, float("inf"), name)).items():
            assert x.isinf().any(-1).sum() == (x[0, ..., 0, 0].numel() if other == name else 0), (name, other)
    assert all(x.dtype == torch.float16 for x in inputs_of(halved(ctx, torch.float16)).values())
    for x in inputs_of(repeated(ctx, 2)).values():
        assert torch.equal(x[..., 2:, :], x[..., :-2, :]) and not torch.equal(x[..., 1:, :], x[..., :-1, :])
    own = copied(ctx)
    for name, x in inputs_of(own).items():
        assert torch.equal(x, inputs_of(ctx)[name]) and x.data_ptr() != inputs_of(ctx)[name].data_ptr()


def test_the_first_sample_alone():
    """What is left is what the sample's own prompt makes: no padding, the same rows."""
    needs = replace(EVERYTHING, rows="all", embeds=False)
    ctx = make_context(needs, [[(2, 3)], [(3, 2), (6, 1)]], 2)
    one, bigger = first_alone(ctx), ctx.attention.key.shape[2]
    seen = one.attention
    assert seen.key.shape[2] == 16 < bigger and seen.key_mask is None
    assert seen.columns.tolist() == [list(range(3, 9))] and seen.rows.tolist() == [list(range(16))]
    assert torch.equal(seen.key[0], ctx.attention.key[0, :, bigger - 16 :])
    assert one.counts == (6,) and one.mask.all() and len(one.features) == len(one.vision[1].key) == 1
    assert torch.equal(one.hidden[0], ctx.hidden[0, :6])

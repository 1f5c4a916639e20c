"""SGL against the released selection in plain loops: the best of the scores that are handed in, and nothing else."""

import pytest
import torch

from helpers.contexts import case, kept_lists, top
from helpers.methods import shuffled
from vlmprune.errors import InputError
from vlmprune.policies import SGL, Needs, policy_from

CASES = [
    pytest.param(["square"], id="one-image"),
    pytest.param(["two", "none", "tall"], id="ragged"),
]


@pytest.mark.parametrize("images", CASES)
@pytest.mark.parametrize("keep", [0.4, 0.05, 3])
@pytest.mark.parametrize("few", [False, True], ids=["random", "ties"])
def test_equals_the_released_selection(images, keep, few):
    """``topk`` of int(n * keep) scores, by sorting: ties to the lower number; the order is the prompt's."""
    ctx = case(images).ctx
    scores = torch.rand(ctx.mask.shape, generator=torch.Generator().manual_seed(1))
    scores = (scores * 3).floor() if few else scores
    got = kept_lists(SGL(lambda _: scores, layer=2, keep=keep).select(ctx))
    for sample, n in enumerate(ctx.counts):
        count = max(1, int(n * keep)) if isinstance(keep, float) else keep * len(ctx.grids[sample])
        assert got[sample] == top(scores[sample, :n].tolist(), min(n, count))


def test_a_sample_of_nan_keeps_its_first_tokens_and_changes_no_other():
    ctx = case(["two", "tall"]).ctx
    scores = shuffled(ctx)
    broken = scores.clone()
    broken[1] = float("nan")
    want, got = (kept_lists(SGL(lambda _, s=s: s, keep=4).select(ctx)) for s in (scores, broken))
    assert got[0] == want[0] and got[1] == [0, 1, 2, 3]


def test_every_image_keeps_its_own():
    ctx = case(["two"]).ctx
    first = -ctx.ordinals.float()
    by_prompt, by_image = (
        kept_lists(SGL(lambda _: first, keep=2, spend=spend).select(ctx))[0] for spend in ("prompt", "image")
    )
    assert by_prompt == [0, 1, 2, 3] and by_image == [0, 1, ctx.images()[0][0], ctx.images()[0][0] + 1]


def test_reads_nothing_itself():
    assert SGL(shuffled).needs(12) == Needs()
    assert SGL(shuffled).layers == (12,) and SGL(shuffled).keep == 0.4


def test_is_data_with_a_guide_that_can_be_imported():
    policy = policy_from("sgl:guide=helpers.methods:shuffled,layer=3")
    assert policy == SGL(shuffled, layer=3) == policy_from(policy.to_dict())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: SGL("small"),
            "guide: expected a function of a TokenContext that scores tokens, got 'small'",
        ),
        (lambda: SGL(shuffled, layer=-1), "layer: expected a whole number >= 0, got -1"),
        (lambda: SGL(shuffled, keep=0), r"keep: expected a share in \(0, 1\] or a whole number .*, got 0"),
        (lambda: policy_from("sgl"), "policy sgl: expected a value for guide, got none"),
    ],
)
def test_settings(make, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        make()


@pytest.mark.parametrize(
    "guide, got",
    [
        (lambda ctx: shuffled(ctx)[:, 1:], r"torch\.float32 \(1, 24\)"),
        (lambda ctx: ctx.ordinals, r"torch\.int64 \(1, 25\)"),
        (lambda ctx: None, "NoneType"),
    ],
)
def test_what_a_guide_returns_is_checked(guide, got):
    ctx = case(["square"]).ctx
    n = ctx.mask.shape[1]
    got = got.replace("25", str(n)).replace("24", str(n - 1))
    with pytest.raises(InputError, match=rf"^guide: expected floating scores \(1, {n}\), got {got}$"):
        SGL(guide).select(ctx)

"""ACCM's selection against its rules in plain loops, on random and adversarial input; always exactly so many tokens."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.contexts import case, images_in, kept_lists, patch_scores, sight, text_case
from vlmprune.policies import Random
from vlmprune.policies.base import Needs, Reduction
from vlmprune.policies.methods.accm_selection import ACCMSelection
from vlmprune.policies.parts.filling import places, shuffled
from vlmprune.policies.parts.outlying import outliers
from vlmprune.policies.parts.received import joined_attention

RELEASE = dict(nearest=False, vision_layer=-1, heads="joined", overflow="last", order="selected")
BATCHES = [
    pytest.param({"images": ["square"]}, id="one"),
    pytest.param({"images": ["tall", "none", ((3, 7), (7, 3))]}, id="ragged"),
    pytest.param({"images": ["square", "square"], "few_values": True}, id="ties"),
    pytest.param({"images": ["square", "square"], "cls": False}, id="no-cls"),
    pytest.param({"images": [((1, 1),), ((1, 1),)]}, id="one-token"),
]


def joined_scores(ctx, layer, image):
    """Attention of CLS, or the mean over all rows, with the heads laid end to end: in numpy, double precision."""
    seen = ctx.vision[layer]
    q, k = (np.concatenate(list(t[image].double().cpu().numpy()), axis=1) for t in (seen.query, seen.key))
    weight = np.exp(q @ k.T / math.sqrt(q.shape[1]))
    share = weight / weight.sum(1, keepdims=True)
    return [round(x, 12) for x in (share[0, 1:] if seen.cls else share.mean(0)).tolist()]


def slow_cosines(ctx, sample):
    words = [ctx.embeds[sample, t].double().cpu().numpy() for t in ctx.text[sample].tolist() if t >= 0]
    tokens = ctx.hidden[sample, : ctx.counts[sample]].double().cpu().numpy()
    cos = [[x @ w / np.linalg.norm(x) / np.linalg.norm(w) for w in words] for x in tokens]
    return np.array(cos).mean(1).round(6).tolist()


def quartile(values, share):
    values, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def slow(attention, relevance, kept, quota, policy):
    """The rules one after the other, in the order in which the tokens are found."""
    N = len(attention)
    asked, sound = [], [j for j in range(N) if relevance and math.isfinite(relevance[j])]
    if len({relevance[j] for j in sound}) > 1:
        sign = -1 if policy.nearest else 1
        asked = sorted(sound, key=lambda j: (sign * relevance[j], j))[:quota]
    low, high = quartile(attention, 0.25), quartile(attention, 0.75)
    out = [j for j in range(N) if attention[j] > high + 1.5 * (high - low)]
    chosen = sorted({*asked, *out})
    if len(chosen) > kept and policy.overflow == "last":
        chosen = chosen[-kept:]
    elif len(chosen) > kept:
        rest = sorted((j for j in out if j not in asked), key=lambda j: (-attention[j], j))
        chosen = sorted([*asked, *rest][:kept])
    if len(chosen) < kept:
        step = math.ceil(N / (kept - len(chosen)))
        chosen = chosen + [j for j in range(0, N, step) if j not in chosen]
        drawn = torch.randperm(N, generator=torch.Generator().manual_seed(policy.seed)).tolist()
        left = sorted((j for j in range(N) if j not in chosen), key=lambda j: drawn[j])
        chosen = chosen + left[: kept - len(chosen)]
    return chosen if policy.order == "selected" else sorted(chosen)


def expected(ctx, policy, kept_of, quota_of, relevance=None):
    """Per sample, what every image of it keeps."""
    attention = patch_scores if policy.heads == "split" else joined_scores
    for sample, here in enumerate(images_in(ctx)):
        found = []
        near = relevance[sample] if relevance else slow_cosines(ctx, sample) if here else []
        for number, first, (r, c) in here:
            kept = kept_of(r * c)
            own = [] if policy.relevance == "none" else near[first : first + r * c]
            scores = attention(ctx, policy.vision_layer, number)
            found += [first + j for j in slow(scores, own, kept, quota_of(kept), policy)]
        yield found


@pytest.mark.parametrize("settings", BATCHES)
@pytest.mark.parametrize("keep, text", [(8, 3), (7, 7), (5, 0), (0.3, 0.5), (1.0, 0.2), (100, 4), (1, None)])
@pytest.mark.parametrize(
    "how",
    [
        dict(),
        RELEASE,
        dict(nearest=False, order="selected", seed=3),
        dict(relevance="none", overflow="last", positions="keep"),
        dict(heads="joined", positions="keep", order="selected"),
    ],
    ids=str,
)
def test_equals_the_rules(settings, keep, text, how):
    ctx = sight(**settings, layers=(-2, -1))
    policy = ACCMSelection(keep, text, **{"positions": "pack"} | how)

    def kept_of(tokens):
        return min(tokens, keep) if isinstance(keep, int) else max(1, int(keep * tokens))

    def quota_of(kept):
        return {None: 1, 0.5: int(kept * 0.5), 0.2: int(kept * 0.2)}.get(text, min(kept, text or 0))

    got = policy.select(ctx)
    index = got.index if isinstance(got, Reduction) else got
    assert isinstance(got, Reduction) == (policy.order == "selected" or policy.positions == "pack")
    assert kept_lists(index) == list(expected(ctx, policy, kept_of, quota_of))


def towered(*peaks, grid=(6, 6), weight=5.0):
    """A context whose CLS attends to some places of each image ever less, and to all others alike."""
    ctx = sight([(grid,)] * len(peaks))
    seen, key = ctx.vision[-2], torch.zeros_like(ctx.vision[-2].key)
    for image, own in enumerate(peaks):
        for rank, place in enumerate(own):
            key[image, :, 1 + place, 0] = weight - 0.1 * rank
    query = torch.zeros_like(seen.query)
    query[..., 0] = 1 / seen.scale
    return replace(ctx, vision={-2: replace(seen, query=query, key=key)})


def ramp(ctx):
    """The earlier in raster order, the more relevant."""
    return -ctx.ordinals.float()


def chosen(ctx, *args, **settings):
    choice = ACCMSelection(*args, **settings, positions="keep").select(ctx)
    return kept_lists(choice.index if isinstance(choice, Reduction) else choice)


def test_an_overflow_keeps_the_question_and_the_strongest_outliers():
    ctx = towered([30, 10, 20, 33, 35, 11])
    assert chosen(ctx, 5, 3, ramp) == [[0, 1, 2, 10, 30]]
    assert chosen(ctx, 5, 3, ramp, overflow="last") == [[11, 20, 30, 33, 35]]
    assert chosen(ctx, 9, 3, ramp) == [[0, 1, 2, 10, 11, 20, 30, 33, 35]]


def test_as_many_outliers_as_there_can_be():
    """A quarter of the patches: of 36 nine may lie above the third quartile."""
    attention = torch.tensor([[1.0] * 27 + [5.0] * 9, [1.0] * 26 + [5.0] * 10])
    assert outliers(attention)[0].sum(1).tolist() == [9, 0]
    ctx = towered(range(27, 36))
    assert chosen(ctx, 4, relevance="none") == [[27, 28, 29, 30]]
    assert chosen(ctx, 4, relevance="none", overflow="last") == [[32, 33, 34, 35]]


def test_no_outliers_and_no_question_is_a_stride():
    ctx = towered([])
    assert chosen(ctx, 6, relevance="none") == [[0, 6, 12, 18, 24, 30]]
    five = chosen(ctx, 5, relevance="none", order="selected")[0]  # step 8
    assert five == [0, 8, 16, 24, 32]
    seven = chosen(ctx, 7, relevance="none", order="selected")[0]  # step 6: one is left over
    drawn = shuffled(0, 36, torch.device("cpu"))[0].tolist()
    assert seven[:6] == [0, 6, 12, 18, 24, 30]
    assert seven[6] == min((j for j in range(36) if j % 6), key=drawn.__getitem__)
    assert seven[6:] != chosen(ctx, 7, relevance="none", order="selected", seed=1)[0][6:]


def test_found_tokens_take_places_of_the_stride():
    """Four to find from 36, at 0, 9, 18, 27; 9 is there already, so one is left over."""
    found = chosen(towered([9, 1]), 6, relevance="none", order="selected")[0]
    assert found[:5] == [1, 9, 0, 18, 27] and found[5] not in found[:5] and len(found) == 6


def test_farthest_and_nearest():
    ctx = towered([])
    assert chosen(ctx, 4, 4, ramp) == [[0, 1, 2, 3]]
    assert chosen(ctx, 4, 4, ramp, nearest=False) == [[32, 33, 34, 35]]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_where_nothing_sets_tokens_apart_the_question_chooses_none(value):
    def same(ctx):
        return torch.full(ctx.mask.shape, value)

    ctx = sight(["square"])
    assert chosen(ctx, 6, relevance=same) == chosen(ctx, 6, relevance="none")


def test_no_text_after_the_image():
    mixed = text_case(["square", "square"], layer=0, after=[5, 0]).ctx
    vision = towered([3], [3]).vision
    mixed = replace(mixed, vision=vision)
    text, none = (chosen(mixed, 6, relevance=r) for r in ("text", "none"))
    assert text[1] == none[1] and text[0] != none[0]


def test_tokens_of_nan_are_not_chosen_by_the_question():
    def odd(ctx):
        return (
            ramp(ctx)
            .index_fill(1, torch.tensor([0, 2]), float("nan"))
            .index_fill(1, torch.tensor([1]), float("inf"))
        )

    assert chosen(towered([]), 3, 3, odd) == [[3, 4, 5]]
    assert chosen(towered([]), 3, 3, odd, nearest=False) == [[33, 34, 35]]


def test_fewer_sound_tokens_than_the_question_may_choose():
    """Two are, the stride has the rest: 36 / 4 = 9."""

    def two(ctx):
        return torch.where(ctx.ordinals < 2, ramp(ctx), float("nan"))

    assert chosen(towered([]), 6, 6, two, order="selected")[0][:5] == [0, 1, 9, 18, 27]


def test_broken_attention_leaves_the_question_and_the_stride():
    ctx = towered([])
    seen = ctx.vision[-2]
    nan = replace(ctx, vision={-2: replace(seen, query=seen.query * float("nan"))})
    assert chosen(nan, 6, 2, ramp) == chosen(ctx, 6, 2, ramp)


def test_neighbours_and_their_number_change_nothing():
    """Leftovers are the same ones wherever an image stands."""
    both, alone = towered([4, 9], [7]), towered([7])
    for keep in range(1, 36):
        assert chosen(both, keep, relevance=ramp)[1] == chosen(alone, keep, relevance=ramp)[0]


def test_exactly_so_many_distinct_tokens():
    ctx = sight([((7, 5), (5, 7))], layers=(-2, -1))
    for keep in range(1, 40):
        for how in (dict(), RELEASE):
            index = ACCMSelection(keep, positions="pack", **how).select(ctx).index[0].tolist()
            counts = [len({j for j in index if lo <= j < lo + 35}) for lo in (0, 35)]
            assert counts == [min(keep, 35)] * 2 and len(index) == sum(counts)


def test_quartiles_are_numpys():
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 3, 4, 5, 36, 576):
        x = torch.rand(3, n, generator=g) ** 4
        low, high = np.percentile(x.cpu().numpy().astype(np.float64), [25, 75], axis=1)
        want = x.cpu().numpy() > (high + 1.5 * (high - low))[:, None]
        assert outliers(x)[0].tolist() == want.tolist()
        order = [sorted(range(n), key=lambda j, row=row: (-row[j], j)) for row in x.tolist()]
        assert outliers(x)[1].argsort(1).tolist() == order


def test_every_stride_fits():
    for n in (1, 5, 36, 576):
        at = torch.arange(n)[None]
        for kept in range(1, n + 1):
            found = places(torch.zeros(1, n, dtype=torch.bool), kept, at, at)
            assert ((found >= n) & (found < 2 * n)).sum() == len(range(0, n, math.ceil(n / kept))) <= kept


def test_joined_heads_where_patches_are_padding():
    """A patch that is padding neither looks nor is looked at; the others see what they see without it."""
    seen = sight(["square"], cls=False).vision[-2]
    cut = replace(seen, query=seen.query[:, :, :30], key=seen.key[:, :, :30])
    mask = torch.arange(36)[None] < 30
    got = joined_attention(replace(seen, mask=mask))
    torch.testing.assert_close(got[:, :30], joined_attention(cut))
    assert got[:, 30:].tolist() == [[0.0] * 6]


@pytest.mark.parametrize(
    "keep, text", [(288, 150), (144, 70), (72, 40), (36, 20), (18, 12), (90, 50), (9, 5)]
)
def test_published_counts(keep, text):
    policy = ACCMSelection(keep, relevance=ramp, positions="pack")
    assert policy.quota(keep) == text
    assert policy.select(sight([((24, 24),)])).index.shape == (1, keep)
    assert ACCMSelection(keep, text=0.25, positions="pack").quota(keep) == keep // 4


def test_no_images():
    for order in ("raster", "selected"):
        assert ACCMSelection(order=order, positions="pack").select(sight(["none", "none"])).shape == (2, 0)


def test_needs():
    assert ACCMSelection(positions="pack").layers == (0,)
    assert ACCMSelection(relevance=ramp, positions="pack").needs(0) == Needs(
        hidden=True, embeds=True, vision=(-2,)
    )
    assert ACCMSelection(relevance="none", vision_layer=-1, positions="pack").needs(0) == Needs(vision=(-1,))
    assert ACCMSelection(positions="pack").ranks(0) and not ACCMSelection(
        order="selected", positions="pack"
    ).ranks(0)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 0}, r"^keep: expected a share in .*, got 0$"),
        ({"text": 1.5}, r"^text: expected a share in \[0, 1\], got 1\.5$"),
        ({"text": -1}, r"^text: expected a whole number >= 0, got -1$"),
        ({"keep": 5, "text": 6}, r"^text: expected at most keep, which is 5, got 6$"),
        ({"relevance": "clip"}, r"^relevance: expected 'text', 'none' or a function .*, got 'clip'$"),
        ({"nearest": 1}, r"^nearest: expected True or False, got 1$"),
        ({"heads": "all"}, r"^heads: expected 'split' or 'joined', got 'all'$"),
        ({"overflow": "first"}, r"^overflow: expected 'score' or 'last', got 'first'$"),
        ({"order": "found"}, r"^order: expected 'raster' or 'selected', got 'found'$"),
        ({"seed": -1}, r"^seed: expected a whole number in \[0, 2\*\*63\), got -1$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        ACCMSelection(**settings)


def test_a_share_leaves_no_room_to_compare_with_a_number():
    assert ACCMSelection(keep=0.1, text=20, positions="pack").quota(4) == 4


def test_select_errors():
    ctx = sight(["square"])
    with pytest.raises(
        ValueError, match=r"^relevance: expected a function that returns \(1, 36\), got \(1,\)$"
    ):
        ACCMSelection(relevance=lambda ctx: ctx.hidden[:, 0, 0], positions="pack").select(ctx)
    for name in ("hidden", "embeds", "text"):
        with pytest.raises(ValueError, match=rf"^ctx\.{name}: expected .* \(declare Needs\(.*got None$"):
            ACCMSelection(positions="pack").select(replace(ctx, **{name: None}))


def test_after_another_stage():
    ctx = case(["square"], layer=0, kept=[[0, 3]]).ctx
    assert Random(layer=0, keep=1).select(ctx).shape == (1, 1)
    with pytest.raises(ValueError, match=r"^ctx\.counts: expected \(36,\), every token .*, got \(2,\)$"):
        ACCMSelection(positions="pack").select(ctx)

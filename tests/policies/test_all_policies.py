"""Every policy of the registry, and what is made of several, under the check that authors of other policies use too."""

from dataclasses import replace

import pytest
import torch

from helpers.methods import echo, shuffled, usual
from helpers.scorers import SLOPE, glance
from vlmprune.policies import (
    ACCM,
    AIM,
    EVS,
    LVLMCSP,
    SGL,
    TRIM,
    VTW,
    ACCMSelection,
    CDPruner,
    Custom,
    DivPrune,
    DyCoke,
    FasterVLM,
    Feather,
    Folder,
    HiPrune,
    HoloV,
    Intersection,
    MustDrop,
    PruMerge,
    PruneVid,
    Random,
    Reduction,
    Scout,
    SparseVLM,
    Stages,
    ToMe,
    Uniform,
    Union,
    VisionTrim,
    VisionZip,
    VisPruner,
)
from vlmprune.policies.registry import BUILT_IN, policy_class
from vlmprune.testing import check_policy
from vlmprune.testing.context import make_context
from vlmprune.testing.context_changes import broken, halved

# Settings that fit images of 20 tokens. A method without a row here fails the first test.
METHODS = {
    "fastv": [dict(), dict(keep=5, rows="mean")],
    "feather": [dict(layers=(1, 4)), dict(layers=(2, 3), keep=0.9, stride=2)],
    "pyramiddrop": [dict(layers=(2, 4)), dict(layers=(0, 2, 4), ratio=(0.5, 0.2, 0.1), positions="pack")],
    "sparsevlm": [
        dict(layers=(3, 7), keep=(5, 0.5)),
        dict(layers=(3,), keep=(0.3,), merge="sum", positions="pack"),
        dict(layers=(3,), keep=(5,), recycle=False),
        dict(layers=(3,), version="1.0", tokens=64),
        dict(layers=(3,), version="paper", scale=0.7),
    ],
    "sparsevlm_plus": [dict(layers=(3,), keep=(5,), heads=3)],
    "dart": [
        dict(keep=8),
        dict(keep=0.3, pivots=(2, 3), count="exact"),
        dict(keep=2, pivots=(0, 4)),
        dict(keep=2, pivots=(0, 4), count="exact"),
        dict(layer=0, keep=8, count="exact", order="norm"),
        dict(layer=0, keep=0.3),
    ],
    "knorm": [dict(), dict(keep=5)],
    "greedyprune": [dict(keep=6, tau=0.3)],
    "v2drop": [dict(layers=(1, 4), keep=(0.5, 3)), dict(layers=(3,), keep=(0.2,))],
    "priortr": [dict(keep=6), dict(keep=0.3, rows="last", heads="max", null=1)],
    "fitprune": [dict(layers=(2, 4), drop=5), dict(layers=(2, 3, 4), drop=(2, 0.3, 1))],
    "mustdrop": [
        dict(layers=(2, 4), global_thr=0.04, individual_thr=0.05),
        dict(layers=(2, 4), keep=6),
        dict(layers=(2, 4), keep=(0.5, 3), key_share=0, positions="pack"),
    ],
    "ficoco": [dict(layers=(2, 4), drop=5), dict(layers=(3,), drop=0.4, targets="kept", merge="mean")],
    "vscan": [dict(keep=8, then=4, window=2, shallow_layer=1)],
    "star": [dict(keep=8, then=4)],
    "vtw": [dict(layer=3)],
    "lvlm_csp": [dict(cluster=6, then=3, rows="text"), dict(cluster=0.3, scatter=2, prune=3, by="cls")],
    "fastervlm": [dict(keep=6), dict(keep=0.5, positions="pack"), dict(keep=6, spend="prompt")],
    "visionzip": [
        dict(dominant=5, contextual=2),
        dict(dominant=5, contextual=2, positions="pack"),
        dict(dominant=0.3, contextual=0.1),
    ],
    "vispruner": [dict(keep=6), dict(keep=5, positions="pack")],
    "folder": [dict(keep=6), dict(keep=0.3, place="projected", positions="pack")],
    "aim": [
        dict(keep=8, layer=2, stages=2),
        dict(keep=0.6, features="keys", layer=2, stages=2, last=0.3, positions="pack"),
    ],
    "divprune": [dict(keep=6), dict(positions="pack"), dict(keep=0.3, spend="image")],
    "cdpruner": [
        dict(keep=6),
        dict(keep=6, relevance="none", positions="pack"),
        dict(keep=6, spend="prompt"),
    ],
    "scope": [dict(keep=6), dict(keep=0.3, alpha=0.5, spend="prompt", positions="pack")],
    "mmtok": [dict(keep=6), dict(keep=0.3, alpha=2, spend="image", positions="pack")],
    "prunesid": [dict(keep=6), dict(keep=0.5, seed=3, positions="pack")],
    "zoo_prune": [dict(keep=6), dict(keep=0.3, directions=4, step=1, spend="prompt", positions="pack")],
    "agilepruner": [dict(keep=6, average=1.0), dict(keep=0.3, cap=0.8, average=0.1, positions="pack")],
    "prumerge": [
        dict(keep=6),
        dict(keep=9, plus=True, neighbours=4, positions="pack"),
        dict(keep=0.6, adaptive=True),
        dict(keep=1.0, adaptive=True, plus=True, positions="pack"),
    ],
    "trim": [dict(keep=6), dict(keep=0.3, positions="pack"), dict(keep=0.8, adaptive=True)],
    "flowcut": [
        dict(keep=6, vision_layers=(0, 1, 2)),
        dict(keep=0.3, vision_layers=(1, 2, 3, 4), positions="pack"),
    ],
    "tome": [dict(keep=6), dict(keep=0.3, rounds=3, positions="pack")],
    "visiontrim": [
        dict(keep=8),
        dict(keep=0.4, score="received", positions="pack"),
        dict(keep=5, text_ratio=0.0),
    ],
    "hired": [dict(keep=6), dict(keep=0.3, content="runs", positions="pack")],
    "globalcom2": [dict(keep=6), dict(keep=0.3, positions="pack")],
    "holov": [dict(keep=6, runs=3), dict(keep=0.3, runs=None, positions="pack")],
    "hiprune": [dict(keep=12, alpha=0.9), dict(keep=0.3, positions="pack")],
    "accm": [
        dict(selection=FasterVLM(), compensator=echo, keep=5),
        dict(selection=VisionZip(dominant=5, contextual=2), compensator=echo, keep=None),
    ],
    "evs": [dict(), dict(keep=6, positions="pack")],
    "vidcom2": [dict(), dict(keep=6, temperature=1.0, positions="pack")],
    "dycoke": [dict(), dict(keep=6, positions="pack")],
    "fastvid": [dict(keep=6), dict(keep=0.5, context=0.8, own=0.0, positions="pack")],
    "flashvid": [
        dict(keep=8, layer=2, tau=0.1),
        dict(keep=0.4, then=4, layer=2, tau=0.1, segments=1, cut=-2, events=False, positions="pack"),
    ],
    "prunevid": [
        dict(layer=2, tau=0.1),
        dict(layer=2, tau=0.1, keep=8),
        dict(layer=2, segments=0.6, keep=0.4, positions="pack"),
    ],
    "holitom": [dict(keep=8, layer=2, tau=0.1), dict(keep=0.4, then=4, layer=2, positions="pack")],
    "accm_selection": [
        dict(keep=8),
        dict(keep=6, text=4, nearest=False, heads="joined", overflow="last", order="selected"),
        dict(keep=0.3, relevance="none", order="selected", positions="pack"),
    ],
    "learned": [
        dict(scorer=SLOPE, layer=2, keep=0.3),
        dict(scorer=glance(8), layer=0, keep=5, spend="image"),
    ],
    "sgl": [dict(guide=shuffled), dict(guide=shuffled, layer=0, keep=3, spend="image")],
    "scout": [
        dict(coarse=Uniform(layer=0, keep=0.3), fine=0.2, look=3),
        dict(coarse=Uniform(layer=0, keep=4), fine=0.2, look=3, by="attention"),
        dict(coarse=DivPrune(keep=5), fine=4, look=2, rope=False, spread=0.5),
        dict(coarse=Random(layer=0, keep=0.3), fine=3, by="random", seed=5),
    ],
    "random_deep": [dict(keep=0.2)],
    "random": [dict(keep=0.4, seed=7), dict(layer=0, keep=3), dict(layer=0, keep=3, spend="image")],
    "uniform": [dict(), dict(keep=5), dict(stride=2)],
}
KEEP_ALL = {
    "fastv": [dict(keep=1.0), dict(keep=10_000, rows="mean")],
    "feather": [dict(layers=(2, 3), keep=1.0)],
    "pyramiddrop": [dict(ratio=1.0), dict(ratio=(1.0, 1.0, 1.0), positions="pack")],
    "sparsevlm": [dict(layers=(3,), keep=(1.0,)), dict(layers=(3,), keep=(1.0,), recycle=False)],
    "sparsevlm_plus": [dict(layers=(3,), keep=(1.0,))],
    "dart": [dict(keep=1.0, count="exact"), dict(layer=0, keep=1.0, count="exact")],
    "knorm": [dict(keep=1.0), dict(keep=10_000)],
    "greedyprune": [dict(keep=1.0)],
    "v2drop": [dict(layers=(1, 4), keep=(1.0, 1.0))],
    "priortr": [dict(keep=1.0), dict(keep=10_000, rows="last")],
    "fitprune": [dict(layers=(2, 4), drop=0)],
    "mustdrop": [dict(layers=(2, 4), keep=1.0), dict(layers=(2, 4), global_thr=1e-9, individual_thr=1e-9)],
    "ficoco": [dict(layers=(2, 4), drop=0)],
    "vscan": [dict(keep=1.0, then=1.0, window=2)],
    "star": [dict(keep=1.0, then=1.0)],
    "lvlm_csp": [dict(cluster=1.0, then=1.0)],
    "fastervlm": [dict(keep=1.0)],
    "visionzip": [dict(dominant=10_000, contextual=3), dict(dominant=0.75, contextual=0.25)],
    "vispruner": [dict(keep=1.0)],
    "folder": [dict(keep=1.0)],
    "aim": [dict(keep=1.0, layer=2, stages=2, last=1.0)],
    "divprune": [dict(keep=1.0)],
    "cdpruner": [dict(keep=1.0)],
    "scope": [dict(keep=1.0)],
    "mmtok": [dict(keep=1.0)],
    "prunesid": [dict(keep=1.0)],
    "zoo_prune": [dict(keep=1.0)],
    "agilepruner": [dict(keep=1.0)],
    "prumerge": [dict(keep=1.0), dict(keep=10_000, plus=True)],
    "trim": [dict(keep=1.0)],
    "flowcut": [dict(keep=1.0, vision_layers=(0, 1))],
    "tome": [dict(keep=1.0)],
    "visiontrim": [dict(keep=1.0), dict(keep=1.0, text_ratio=1.0)],
    "hired": [dict(keep=1.0)],
    "globalcom2": [dict(keep=1.0), dict(keep=10_000)],
    "holov": [dict(keep=1.0), dict(keep=10_000, runs=None)],
    "hiprune": [dict(keep=1.0, alpha=1.0)],
    "accm": [dict(selection=FasterVLM(), compensator=echo, keep=1.0)],
    "evs": [dict(keep=1.0), dict(keep=10_000)],
    "vidcom2": [dict(keep=1.0), dict(keep=10_000)],
    "dycoke": [dict(keep=1.0), dict(keep=10_000)],
    "fastvid": [dict(keep=1.0), dict(keep=10_000)],
    "flashvid": [dict(keep=1.0, then=1.0, tau=0.1)],
    "prunevid": [dict(keep=1.0, then=1.0, tau=0.1)],
    "holitom": [dict(keep=1.0, then=1.0, tau=0.1)],
    "accm_selection": [dict(keep=1.0), dict(keep=10_000, order="selected")],
    "learned": [dict(scorer=SLOPE, layer=2, keep=1.0)],
    "sgl": [dict(guide=shuffled, keep=1.0)],
    "scout": [dict(coarse=Uniform(layer=0, keep=1.0)), dict(coarse=Random(layer=0, keep=10_000), fine=3)],
    "random_deep": [dict(keep=1.0)],
    "random": [dict(keep=1.0), dict(keep=10_000)],
    "uniform": [dict(keep=1.0), dict(keep=10_000), dict(stride=1)],
}
KEEPS_NONE = {"vtw"}


def every_other(ctx):
    even = torch.arange(0, ctx.mask.shape[1] + 1, 2).expand(len(ctx.counts), -1)
    return torch.where(even < torch.tensor(ctx.counts)[:, None], even, -1)


def made(table):
    return [policy_class(name)(**row) for name, rows in table.items() for row in rows]


def stage(name, **settings):
    return policy_class(name)(**settings)


COMPOSED = [
    Stages([stage("fastv", layer=1, keep=0.2), stage("random", layer=4)]),
    Stages([stage("fastervlm", keep=6), stage("sparsevlm", layers=(3,), keep=(3,))]),
    stage("fastv", keep=4) | stage("uniform", stride=3) | stage("random", keep=0.1),
    stage("fastv", keep=0.6) & stage("uniform", keep=0.6),
    Custom(2, every_other),
]
COMPOSED_KEEP_ALL = [
    Stages([stage("random", layer=2, keep=1.0), stage("uniform", layer=3, keep=36)]),
    stage("random", keep=1) | stage("fastv", keep=1.0),
    stage("random", keep=1.0) & stage("uniform", stride=1),
]
POLICIES = [*made(METHODS), *COMPOSED]
ALL_STAY = [*made(KEEP_ALL), *COMPOSED_KEEP_ALL]


def test_every_method_is_here():
    assert METHODS.keys() == BUILT_IN.keys()
    assert KEEP_ALL.keys() == BUILT_IN.keys() - KEEPS_NONE
    assert len(set(POLICIES)) == len(POLICIES)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_holds_what_every_policy_holds(policy):
    ran = check_policy(policy)
    assert f"layer {policy.layers[-1]}, one token" in ran and ran[-1] == "settings are a value"
    assert type(policy).summary


@pytest.mark.parametrize("keep_all", ALL_STAY, ids=repr)
def test_all_stay(keep_all):
    ran = check_policy(stage("uniform", layer=0), keep_all=keep_all)
    assert all(f"layer {layer}, keep_all, a padded batch" in ran for layer in keep_all.layers)


def chosen(policy, ctx):
    choice = policy.select(ctx)
    return choice.index if isinstance(choice, Reduction) else choice


def counts(policy, ctx):
    return (chosen(policy, ctx) >= 0).sum(1).tolist()


def counts_by_data(policy):
    """Whether how many stay depends on which: a union with a grid, an overlap, a rank, outliers, thresholds."""
    rank = isinstance(policy, SparseVLM) and policy.version != "1.5"
    outliers = isinstance(policy, PruMerge | TRIM) and policy.adaptive
    by_threshold = isinstance(policy, MustDrop | PruneVid) and policy.keep is None
    return rank or outliers or by_threshold or isinstance(policy, Feather | Union | Intersection)


@pytest.mark.parametrize("policy", [p for p in POLICIES if not counts_by_data(p)], ids=repr)
def test_counts_do_not_depend_on_the_values(policy):
    """Not on NaN or infinities in one sample, nor on the precision."""
    for layer in policy.layers:
        ctx = make_context(policy.needs(layer), [[(4, 5)], [], [(5, 4), (2, 10)]], layer)
        wanted = counts(policy, ctx)
        for value in (float("nan"), float("inf")):
            assert counts(policy, broken(ctx, 2, value)) == wanted
        for dtype in (torch.float16, torch.bfloat16):
            assert counts(policy, halved(ctx, dtype)) == wanted


def chooses_by_more_than_scores(policy):
    """By place, chance or distance as well."""
    if isinstance(policy, Stages):
        return any(map(chooses_by_more_than_scores, policy.policies))
    if isinstance(policy, ACCM):
        return chooses_by_more_than_scores(policy.selection)
    return isinstance(
        policy,
        ACCMSelection
        | AIM
        | CDPruner
        | Custom
        | DyCoke
        | EVS
        | Feather
        | Folder
        | HiPrune
        | HoloV
        | Intersection
        | LVLMCSP
        | PruMerge
        | TRIM
        | ToMe
        | VisionTrim
        | Random
        | Scout
        | SGL
        | Uniform
        | Union
        | VisionZip
        | VisPruner
        | VTW,
    )


@pytest.mark.parametrize("policy", [p for p in POLICIES if not chooses_by_more_than_scores(p)], ids=repr)
def test_a_sample_of_nan_keeps_its_first_tokens(policy):
    for layer in policy.layers:
        ctx = make_context(policy.needs(layer), [[(4, 5)], [(5, 4)], [(2, 10)]], layer)
        sound, index = chosen(policy, ctx), chosen(policy, broken(ctx, 1, float("nan")))
        first = list(range(index.shape[1]))
        assert index[1].tolist() == first
        if policy != stage("fastv", keep=5, rows="mean"):  # more rows see the first tokens
            assert any(row != first for row in sound.tolist())


def told(policy, ctx):
    """What ``kept`` says of every sample."""
    return [policy.kept(n, m, ctx.layer) for n, m in zip(ctx.counts, ctx.image_counts(), strict=True)]


@pytest.mark.parametrize(
    "policy",
    [p for p in POLICIES if not (counts_by_data(p) or isinstance(p, Custom) or p == Uniform(stride=2))],
    ids=repr,
)
def test_a_budget_is_what_a_run_keeps(policy):
    """At every stage, from what the one before has left."""
    images, kept = [[(4, 5)], [], [(5, 4), (2, 10)]], None
    for layer in policy.layers:
        ctx = make_context(policy.needs(layer), images, layer, kept=kept)
        assert counts(policy, ctx) == told(policy, ctx)
        kept = [range(n) for n in told(policy, ctx)]


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in KEEPS_NONE])
def test_a_share_of_1_is_everything_and_an_int_is_tokens_per_image(name):
    cls, whole = policy_class(name), usual(name).at(1.0)
    assert [whole.kept(1152, 2, layer) for layer in whole.layers] == [1152] * len(whole.layers)
    if "keep" in cls.__dataclass_fields__ and name not in (
        "feather",
        "sparsevlm",
        "sparsevlm_plus",
        "dart",
        "v2drop",
    ):
        for keep in (1, 5):
            assert usual(name, keep=keep).kept(1152, 2, whole.layers[0]) == 2 * keep


@pytest.mark.parametrize(
    "name", ["fastv", "knorm", "random", "random_deep", "fastervlm", "divprune", "cdpruner"]
)
@pytest.mark.parametrize("keep", [4, 0.2])
def test_how_a_budget_is_spent(name, keep):
    """By image each one keeps its own; by prompt they may win each other's."""
    by_image, by_prompt = (stage(name, keep=keep, spend=spend) for spend in ("image", "prompt"))
    (layer,) = by_image.layers
    ctx = make_context(by_image.needs(layer), [[(4, 5), (5, 4)], [], [(2, 10)]], layer)
    for policy in (by_image, by_prompt):
        assert counts(policy, ctx) == told(policy, ctx) == [8, 0, 4]
    choice = by_image.select(ctx)
    index = choice.index if isinstance(choice, Reduction) else choice
    assert ((index >= 0) & (index < 20)).sum(1).tolist() == [4, 0, 4]
    with pytest.raises(ValueError, match=r"^spend: expected 'prompt', 'image' or 'crop', got 'all'$"):
        stage(name, spend="all")


def test_by_image_a_choice_is_that_of_each_image_alone():
    for name in ("fastv", "divprune"):
        policy = stage(name, keep=4, spend="image")
        ctx = make_context(policy.needs(policy.layers[0]), [[(4, 5), (5, 4)]], policy.layers[0])
        whole = stage(name, keep=1.0)
        assert whole.select(ctx).shape == (1, 40)
        if name == "fastv":
            scores = ctx.attention.received(ctx.attention.last)[0]
            best = [20 * i + scores[20 * i :][:20].topk(4).indices.sort().values for i in (0, 1)]
            assert policy.select(ctx)[0].tolist() == torch.cat(best).tolist()
        else:
            halves = [stage(name, keep=4).select(part(ctx, i)) + 20 * i for i in (0, 1)]
            assert policy.select(ctx).tolist() == torch.cat(halves, 1).tolist()


def part(ctx, image):
    """One of two images of 20 tokens."""
    here = slice(20 * image, 20 * image + 20)
    return replace(
        ctx,
        mask=ctx.mask[:, here],
        counts=(20,),
        ordinals=ctx.ordinals[:, here] - 20 * image,
        hidden=ctx.hidden[:, here],
        grids=(ctx.grids[0][image : image + 1],),
    )


def test_by_image_needs_whole_images():
    said = r"^spend: expected 'prompt' after an earlier stage, or in prefill by chunks, got 'image'$"
    policy = stage("fastv", spend="image")
    later = make_context(policy.needs(2), [[(4, 5), (5, 4)]], 2, kept=[[0, 7, 30]])
    chunk = replace(make_context(policy.needs(2), [[(4, 5)]], 2), shares=(0.5,))
    for ctx in (later, chunk):
        with pytest.raises(ValueError, match=said):
            policy.select(ctx)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm_plus"])
def test_a_sample_whose_attention_is_nan_keeps_its_first_tokens(name):
    policy = stage(name, **METHODS[name][0])
    layer = policy.layers[0]
    ctx = make_context(policy.needs(layer), [[(4, 5)], [(5, 4)]], layer)
    choice = policy.select(broken(ctx, 1, float("nan")))
    index = choice.index if isinstance(choice, Reduction) else choice
    assert index[1].tolist() == list(range(index.shape[1]))
    assert index[0].tolist() != list(range(index.shape[1]))

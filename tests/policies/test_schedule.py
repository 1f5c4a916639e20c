"""Budgets: the share found meets the budget, one token more would not, and impossible budgets are refused."""

from dataclasses import replace

import pytest

from helpers.methods import usual
from vlmprune.errors import InputError
from vlmprune.flops import DecoderShape, decoder_flops, layer_inputs, mean_tokens, wave_flops
from vlmprune.policies import (
    DART,
    LVLMCSP,
    Custom,
    FastV,
    Feather,
    MustDrop,
    PruneVid,
    PyramidDrop,
    Random,
    RandomDeep,
    SparseVLM,
    SparseVLMPlus,
    Stages,
    Uniform,
    VisionZip,
    VScan,
)
from vlmprune.policies.registry import BUILT_IN
from vlmprune.policies.schedule import keep_for_flops, keep_for_mean_tokens, stage_counts, wave_rows

VICUNA = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008)
POLICIES = [
    FastV(),
    FastV(layer=3),
    PyramidDrop(),
    PyramidDrop(ratio=(0.5, 0.4, 0.3)),
    Stages([Uniform(), RandomDeep()]),
    DART(count="exact"),
    SparseVLM(),
    SparseVLMPlus(),
    LVLMCSP(),
    FastV() | Random(),
    FastV() & Random() & Uniform(),
]


def cut_of(policy, visual=576, text=60):
    stages = stage_counts(policy, visual)
    lengths = [n + text for n in layer_inputs(32, visual, stages)]
    again = wave_flops(VICUNA, lengths, wave_rows(policy, stages, text))  # in test_scout.py written out
    return 1 - (decoder_flops(VICUNA, lengths) + again) / decoder_flops(VICUNA, [visual + text] * 32)


def mean_of(policy, visual=576):
    return mean_tokens(layer_inputs(32, visual, stage_counts(policy, visual)))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("cut", [0.3, 0.5])
def test_flops(policy, cut):
    share = keep_for_flops(policy, cut, VICUNA, 576, 60)
    assert cut_of(policy.at(share)) >= cut > cut_of(policy.at(share + 1 / 288))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("mean", [192, 250.5])
def test_mean(policy, mean):
    if policy.layers == (8, 16, 24):
        mean += 60  # eight layers of 576 come first
    share = keep_for_mean_tokens(policy, mean, 32, 576)
    assert mean_of(policy.at(share)) <= mean < mean_of(policy.at(share + 1 / 288))


def test_by_hand():
    """FastV, K = 2: two layers of 576 and thirty of 288 are 306 on average; a count one higher is 306.9375."""
    for mean, kept in ((306.0, 288), (306.9, 288), (306.9375, 289)):
        share = keep_for_mean_tokens(FastV(), mean, 32, 576)
        assert stage_counts(FastV(keep=share), 576) == [(2, kept)]
    assert keep_for_mean_tokens(FastV(), 576, 32, 576) == 1.0
    assert keep_for_flops(FastV(), 0.0, VICUNA, 576, 60) == 1.0


def test_shares_are_short():
    """The same counts in as few decimals as will do."""
    assert keep_for_mean_tokens(FastV(), 306.0, 32, 576) == 0.5
    assert keep_for_mean_tokens(Random(layer=0), 64, 32, 576) == 0.112


def test_pyramiddrop_at_half_the_flops():
    """Cuts from the counts themselves, 288, 144 and 72 at the published layers."""
    cut = cut_of(PyramidDrop(ratio=0.5))
    share = keep_for_flops(PyramidDrop(), cut, VICUNA, 576, 60)
    assert stage_counts(PyramidDrop(ratio=share), 576) == [(8, 288), (16, 144), (24, 72)]


SHARED = [name for name in BUILT_IN if name != "vtw"]  # which keeps nothing, so has no share to set


@pytest.mark.parametrize("name", SHARED)
def test_every_method_meets_a_budget(name):
    """With its default settings."""
    policy = usual(name)
    share = keep_for_flops(policy, 0.3, VICUNA, 256, 27)
    assert cut_of(policy.at(share), 256, 27) >= 0.3 > cut_of(policy.at(min(1.0, share + 0.02)), 256, 27)
    assert keep_for_flops(policy, 0.0, VICUNA, 256, 27) == 1.0
    assert stage_counts(policy.at(1.0), 256) == [(layer, 256) for layer in policy.layers]


def test_the_settings_that_a_share_goes_to():
    assert Uniform().at(0.4) == Uniform(keep=0.4)
    assert Random(seed=7).at(0.4) == Random(seed=7, keep=0.4)
    assert PyramidDrop().at(0.4) == PyramidDrop(ratio=(0.5, 0.4, 0.3)).at(0.4) == PyramidDrop(ratio=0.4)
    assert SparseVLM(layers=(2, 5), keep=(0.5, 0.5)).at(0.4).keep == (0.4, 0.4)
    assert SparseVLMPlus().at(0.4) == SparseVLMPlus(keep=(0.4, 0.4, 0.4))
    assert VScan().at(0.4) == VScan(keep=0.4, then=0.4)
    assert Stages([FastV(), RandomDeep()]).at(0.4) == Stages([FastV(keep=0.4), RandomDeep(keep=0.4)])
    zipped = VisionZip(dominant=3, contextual=1, count_cls=True).at(0.4)
    assert (zipped.dominant, zipped.contextual) == pytest.approx((0.3, 0.1)) and not zipped.count_cls
    assert VisionZip(tokens=192).at(0.25) == VisionZip().at(0.25)


@pytest.mark.parametrize("share", [0.05, 0.36, 0.5, 1.0])
def test_a_pair_is_expected_to_keep_the_share(share):
    for pair in (FastV() | Random(), FastV() & Random(), FastV() | Random() | Uniform()):
        assert pair.at(share).kept(576, 1, 2) == pytest.approx(share * 576, abs=4)


@pytest.mark.parametrize(
    "policy, said",
    [
        (
            FastV,
            r"^policy: expected a policy, such as FastV\(\), got <class 'vlmprune.policies.methods.fastv.FastV'>$",
        ),
        (Custom(2, len), r"^Custom: expected a policy with a share to set, got the function len$"),
        (SparseVLM(version="paper"), r"^keep: expected \(\) for version 'paper'"),
        (Uniform(stride=2), r"^keep: expected either keep or stride"),
    ],
)
def test_what_takes_no_share(policy, said):
    for fit in (
        lambda: keep_for_flops(policy, 0.5, VICUNA, 576, 60),
        lambda: keep_for_mean_tokens(policy, 300, 32, 576),
    ):
        with pytest.raises(InputError, match=said):
            fit()


def test_what_cannot_count_in_advance():
    with pytest.raises(
        InputError, match=r"^Custom: expected a policy that says how many .*, got the function len"
    ):
        Custom(2, len).kept(576, 1, 2)
    with pytest.raises(InputError, match=r"^version: expected '1.5' for counts .* in advance, got '1.0'$"):
        SparseVLM(version="1.0").kept(576, 1, 3)


@pytest.mark.parametrize(
    "policy", [FastV(), VScan(), VisionZip(), FastV() | Random(), PyramidDrop()], ids=repr
)
@pytest.mark.parametrize("share", [0.0, 1, 1.5, "0.5"])
def test_a_share_is_a_float(policy, share):
    with pytest.raises(InputError, match=r": expected .*\(0, 1\] as a float \(1\.0 is everything\), got "):
        policy.at(share)


@pytest.mark.parametrize("visual", [0, 1, 7, 36])
def test_few_tokens(visual):
    kept = min(visual, 1)
    assert stage_counts(FastV(keep=0.01), visual) == [(2, kept)]
    assert [n for _, n in stage_counts(PyramidDrop(ratio=0.01), visual)] == [kept] * 3
    for policy in map(usual, SHARED):
        by_data = isinstance(policy, MustDrop | PruneVid)  # how many stay by default
        for least in (policy.at(1e-6),) if by_data else (policy, policy.at(1e-6)):
            for layer, n in stage_counts(least, visual):
                assert kept <= n <= visual, (least, layer)


def test_rejects():
    with pytest.raises(ValueError, match=r"^cut: expected a share between 0\.0000 and 0\.4\d*, got 0\.9$"):
        keep_for_flops(FastV(layer=16), 0.9, VICUNA, 576, 60)
    with pytest.raises(ValueError, match=r"^cut: expected a share between 0\.0000 and 0\.\d*, got -0\.1$"):
        keep_for_flops(FastV(), -0.1, VICUNA, 576, 60)
    with pytest.raises(ValueError, match=r"^mean: expected tokens between 36\.94 and 576\.00, got 30$"):
        keep_for_mean_tokens(FastV(), 30, 32, 576)
    with pytest.raises(ValueError, match=r"^mean: expected tokens between 36\.94 and 576\.00, got 577$"):
        keep_for_mean_tokens(FastV(), 577, 32, 576)
    with pytest.raises(ValueError, match=r"^stages: expected ascending layers in 0\.\.15, got \[20\]$"):
        keep_for_mean_tokens(RandomDeep(), 400, 16, 576)


def test_feather_counts_its_grid():
    """Between the best and these plus the grid."""
    (_, first), (_, second) = stage_counts(Feather(), 729)
    assert 218 <= first <= 299 and second == int(0.09 * first)
    assert keep_for_flops(Feather(), 0.4, VICUNA, 729, 60) < 1.0
    assert replace(Feather(), stride=100).kept(729, 1, 8) == pytest.approx(218, abs=1)

"""Budgets: the share found meets the budget, one token more would not, and impossible budgets are refused."""

import pytest

from vlmprune.errors import InputError
from vlmprune.flops import DecoderShape, decoder_flops, layer_inputs, mean_tokens
from vlmprune.policies import Custom, FastV, Feather, Random, Stages, Uniform, VisionZip, policies
from vlmprune.policies.dart import DART
from vlmprune.policies.pyramiddrop import PyramidDrop
from vlmprune.policies.random_deep import RandomDeep
from vlmprune.policies.schedule import keep_for_flops, keep_for_mean_tokens, stage_counts
from vlmprune.policies.sparsevlm import SparseVLM
from vlmprune.policies.sparsevlm_plus import SparseVLMPlus

VICUNA = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008)
FACTORIES = [
    pytest.param(FastV, id="class"),
    pytest.param(lambda keep: FastV(layer=3, keep=keep), id="layer-3"),
    pytest.param(FastV(layer=3), id="policy"),
    pytest.param(PyramidDrop, id="pyramid-class"),
    pytest.param(SparseVLMPlus, id="sparsevlm-plus-class"),
    pytest.param(lambda keep: PyramidDrop(ratio=keep), id="pyramid"),
    pytest.param(lambda keep: Stages([Uniform(keep=keep), RandomDeep(keep=keep)]), id="stages"),
    pytest.param(lambda keep: DART(keep=keep, count="exact"), id="dart"),
    pytest.param(lambda keep: SparseVLM(keep=(keep, keep, keep)), id="sparsevlm"),
    pytest.param(lambda keep: SparseVLMPlus(keep=(keep, keep, keep)), id="sparsevlm-plus"),
]


def make(factory, keep):
    factory = factory() if isinstance(factory, type) else factory
    return factory(keep) if callable(factory) else factory.with_share(keep)


def cut_of(factory, keep, visual=576, text=60):
    lengths = layer_inputs(32, visual, stage_counts(make(factory, keep), visual))
    return 1 - decoder_flops(VICUNA, [n + text for n in lengths]) / decoder_flops(
        VICUNA, [visual + text] * 32
    )


def mean_of(factory, keep, visual=576):
    return mean_tokens(layer_inputs(32, visual, stage_counts(make(factory, keep), visual)))


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("cut", [0.3, 0.5])
def test_flops(factory, cut):
    keep = keep_for_flops(factory, cut, VICUNA, 576, 60)
    assert cut_of(factory, keep) >= cut > cut_of(factory, keep + 1 / 288)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("mean", [192, 250.5])
def test_mean(factory, mean):
    if make(factory, 1e-9).layers == (8, 16, 24):
        mean += 60  # eight layers of 576 come first
    keep = keep_for_mean_tokens(factory, mean, 32, 576)
    assert mean_of(factory, keep) <= mean < mean_of(factory, keep + 1 / 288)


def test_by_hand():
    """FastV, K = 2: two layers of 576 and thirty of 288 are 306 on average; a count one higher is 306.9375."""
    assert stage_counts(FastV(keep=keep_for_mean_tokens(FastV, 306.0, 32, 576)), 576) == [(2, 288)]
    assert stage_counts(FastV(keep=keep_for_mean_tokens(FastV, 306.9, 32, 576)), 576) == [(2, 288)]
    assert stage_counts(FastV(keep=keep_for_mean_tokens(FastV, 306.9375, 32, 576)), 576) == [(2, 289)]
    assert keep_for_mean_tokens(FastV, 576, 32, 576) == 1.0
    assert keep_for_flops(FastV, 0.0, VICUNA, 576, 60) == 1.0


def test_shares_are_short():
    """The same counts in as few decimals as will do."""
    assert keep_for_mean_tokens(FastV, 306.0, 32, 576) == 0.5
    assert keep_for_mean_tokens(lambda keep: Random(layer=0, keep=keep), 64, 32, 576) == 0.112


def test_pyramiddrop_at_half_the_flops():
    """Cuts from the counts themselves, 288, 144 and 72 at the published layers."""
    cut = cut_of(PyramidDrop, 0.5)
    keep = keep_for_flops(lambda keep: PyramidDrop(ratio=keep), cut, VICUNA, 576, 60)
    assert stage_counts(PyramidDrop(ratio=keep), 576) == [(8, 288), (16, 144), (24, 72)]


def test_counts_that_depend_on_the_data():
    """FEATHER's union on random data is between its top-k and that plus the grid, and rises with the share."""
    (_, first), (_, second) = stage_counts(Feather(), 729)
    assert 218 <= first <= 299 and second == int(0.09 * first)
    assert keep_for_flops(lambda keep: Feather(keep=keep), 0.4, VICUNA, 729, 60) < 1.0


@pytest.mark.parametrize("name", sorted({*policies()} - {"visionzip"}))
def test_every_method_with_a_share_meets_a_budget(name):
    cls = policies()[name]
    cut = 0.5 if name == "vscan" else 0.3  # its second stage alone saves 43 %
    keep = keep_for_flops(cls, cut, VICUNA, 256, 27)
    assert cut_of(cls, keep, 256, 27) >= cut > cut_of(cls, min(1.0, keep + 0.02), 256, 27)


def test_a_policy_is_sized_as_its_class_is():
    assert keep_for_flops(FastV(), 0.3, VICUNA, 576, 60) == keep_for_flops(FastV, 0.3, VICUNA, 576, 60)


def test_the_setting_that_a_share_goes_to():
    assert Uniform().with_share(0.4) == Uniform(keep=0.4)
    assert Random(seed=7).with_share(0.4) == Random(seed=7, keep=0.4)
    assert PyramidDrop().with_share(0.4) == PyramidDrop(ratio=0.4)
    assert PyramidDrop(ratio=(0.5, 0.4, 0.3)).with_share(0.4).ratio == (0.4, 0.4, 0.4)
    assert SparseVLM(layers=(2, 5), keep=(0.5, 0.5)).with_share(0.4).keep == (0.4, 0.4)
    assert SparseVLMPlus().with_share(0.4) == SparseVLMPlus(keep=(0.4, 0.4, 0.4))


@pytest.mark.parametrize(
    "factory, said",
    [
        (
            VisionZip,
            r"^VisionZip: expected a setting 'keep' .*, got none \(instead .* lambda keep: VisionZip\(",
        ),
        (Custom, r"^factory: expected lambda keep: Custom\(\.\.\.\), got Custom, which needs layer$"),
        (Stages, r"^factory: expected lambda keep: Stages\(\.\.\.\), got Stages, which needs policies$"),
        (FastV() | Random(), r"^Union: expected a setting 'keep' that takes a share, got none"),
        (SparseVLM(version="paper"), r"^keep: expected \(\) for version 'paper'"),
    ],
)
def test_what_takes_no_share(factory, said):
    for fit in (
        lambda: keep_for_flops(factory, 0.5, VICUNA, 576, 60),
        lambda: keep_for_mean_tokens(factory, 300, 32, 576),
    ):
        with pytest.raises(InputError, match=said):
            fit()


@pytest.mark.parametrize("visual", [0, 1, 7, 36])
def test_few_tokens(visual):
    kept = min(visual, 1)
    assert stage_counts(FastV(keep=0.01), visual) == [(2, kept)]
    assert [n for _, n in stage_counts(PyramidDrop(ratio=0.01), visual)] == [kept] * 3


def test_rejects():
    with pytest.raises(ValueError, match=r"^cut: expected a share between 0\.0000 and 0\.4\d*, got 0\.9$"):
        keep_for_flops(lambda keep: FastV(layer=16, keep=keep), 0.9, VICUNA, 576, 60)
    with pytest.raises(ValueError, match=r"^cut: expected a share between 0\.0000 and 0\.\d*, got -0\.1$"):
        keep_for_flops(FastV, -0.1, VICUNA, 576, 60)
    with pytest.raises(ValueError, match=r"^mean: expected tokens between 36\.94 and 576\.00, got 30$"):
        keep_for_mean_tokens(FastV, 30, 32, 576)
    with pytest.raises(ValueError, match=r"^mean: expected tokens between 36\.94 and 576\.00, got 577$"):
        keep_for_mean_tokens(FastV, 577, 32, 576)
    with pytest.raises(ValueError, match=r"^stages: expected ascending layers in 0\.\.15, got \[20\]$"):
        keep_for_mean_tokens(RandomDeep, 400, 16, 576)

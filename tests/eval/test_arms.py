"""What is compared: every policy meets the budget, the baselines meet the same one, impossible ones are refused."""

import pytest

from helpers.methods import echo
from vlmprune.eval.arms import BASELINES, ORACLE, UNPRUNED, Arm, PromptSize, cost, cut_of, make_arms
from vlmprune.flops import DecoderShape, decoder_flops, layer_inputs
from vlmprune.policies import ACCM, FastV, PyramidDrop, Random, Stages, Uniform, policy_from
from vlmprune.policies.schedule import stage_counts

PROMPT = PromptSize(
    DecoderShape(layers=8, hidden=64, heads=4, kv_heads=4, head_dim=16, intermediate=96), 196, 12
)

BOTH = ("lattice", "random")


def plan_of(texts, budgets, baselines, seeds):
    return make_arms({text: policy_from(text) for text in texts}, budgets, baselines, seeds, PROMPT)


def cut(policy):
    lengths = layer_inputs(8, 196, stage_counts(policy, 196))
    pruned = decoder_flops(PROMPT.shape, [n + 12 for n in lengths])
    return 1 - pruned / decoder_flops(PROMPT.shape, [208] * 8)


def test_every_arm_meets_its_budget():
    arms = plan_of(["fastv", "pyramiddrop:layers=2/4/6"], [0.3, 0.5], BOTH, 2)
    assert arms[0].method == UNPRUNED and arms[0].policy is None
    assert [(arm.method, arm.budget, arm.seed) for arm in arms[1:]] == [
        ("fastv", 0.3, 0),
        ("fastv", 0.5, 0),
        ("pyramiddrop:layers=2/4/6", 0.3, 0),
        ("pyramiddrop:layers=2/4/6", 0.5, 0),
        ("uniform:layer=2", 0.3, 0),
        ("uniform:layer=2", 0.5, 0),
        *(("random:layer=2", budget, seed) for budget in (0.3, 0.5) for seed in (0, 1)),
    ]
    for arm in arms[1:]:
        assert arm.budget <= cut(arm.policy) < arm.budget + 0.02


def test_a_budget_pays_for_a_second_wave():
    """The same tokens in one wave cost less; and every layer sees them all."""
    arm = plan_of(["scout:coarse=(uniform:layer=0,keep=0.2),fine=0.1,look=4"], [0.6], (), 1)[1]
    once = Uniform(layer=0, keep=arm.policy.kept(196, 1, 4))
    assert 0.6 <= cut_of(arm, PROMPT) < 0.62 and cut(once) > cut_of(arm, PROMPT) + 0.005
    stages = stage_counts(arm.policy, 196)
    (_, coarse), (look, both) = stages
    saved, tokens = cost(PROMPT, stages, wave=(look, both - coarse + 12))
    assert saved == cut_of(arm, PROMPT) and tokens == both


def test_policies_as_given_and_baselines_at_their_cut():
    arms = plan_of(["fastv:layer=3,keep=50", "pyramiddrop:layers=2/4/6"], [], BOTH, 1)
    fastv, pyramid, *baselines = arms[1:]
    assert fastv.policy == FastV(layer=3, keep=50) and pyramid.policy == PyramidDrop(layers=(2, 4, 6))
    assert fastv.budget is None
    given = sorted((cut(fastv.policy), cut(pyramid.policy)))
    assert [arm.method for arm in baselines] == ["uniform:layer=2"] * 2 + ["random:layer=2"] * 2
    assert [cut(arm.policy) for arm in baselines] == pytest.approx(given * 2, abs=0.01)


def test_a_baseline_has_as_many_tokens_at_the_same_layers():
    for tokens in range(5, 180):
        _, given, lattice = plan_of([f"divprune:keep={tokens}"], [], ("lattice",), 1)
        assert lattice.policy.kept(PROMPT.visual, 1, 0) == tokens and cut(lattice.policy) == cut(given.policy)


def test_a_baseline_that_is_given_is_not_added():
    assert [a.method for a in plan_of(["uniform:layer=1"], [0.5], BOTH, 1)] == [
        UNPRUNED,
        "uniform:layer=1",
        "random:layer=1",
    ]
    assert [a.method for a in plan_of(["fastv", "fastv"], [0.5], (), 3)] == [UNPRUNED, "fastv"]


def test_an_oracle_meets_the_budget_and_is_told_the_regions_of_its_batch():
    *_, uniform, oracle = plan_of(["fastv:layer=3"], [0.5], ("lattice", ORACLE), 2)
    assert (oracle.method, oracle.budget, oracle.seed) == ("oracle:layer=3", 0.5, 0)
    assert oracle.policy.keep == uniform.policy.keep
    regions = ((0.0, 0.0, 0.5, 0.5), None)
    told = oracle.for_batch(0, regions)
    assert told.regions == regions and told.keep == oracle.policy.keep
    assert repr(told) == oracle.key and oracle.policy.regions == ()


def test_no_policy_compares_the_baselines():
    assert {a.method for a in plan_of([], [0.5], BOTH, 1)} == {
        UNPRUNED,
        "uniform:layer=2",
        "random:layer=2",
    }


def test_every_batch_and_seed_draws_anew_under_one_key():
    one, two = plan_of(["random"], [0.5], (), 2)[1:]
    assert one.key == two.key
    drawn = [arm.for_batch(batch, [None]) for arm in (one, two) for batch in (0, 1)]
    assert len({policy.seed for policy in drawn}) == 4
    assert {policy.keep for policy in drawn} == {one.policy.keep}
    assert one.for_batch(1, [None]) == one.for_batch(1, [None])
    (fastv,) = plan_of(["fastv"], [0.5], (), 2)[1:]
    assert fastv.for_batch(3, [None]) is fastv.policy


def test_by_default_the_lattice_the_raster_random_tokens_and_a_smaller_picture():
    arms = plan_of([], [0.5], BASELINES, 1)
    assert [arm.method for arm in arms] == [
        UNPRUNED,
        "uniform:layer=2",
        "uniform:layer=2,order=raster",
        "random:layer=2",
        "smaller",
    ]
    assert len({arm.key for arm in arms}) == 5
    given = plan_of(["uniform:order=raster"], [0.5], BASELINES, 1)
    assert [arm.method for arm in given][1:3] == ["uniform:order=raster", "uniform:layer=2"]
    assert len(given) == len(arms)


def test_the_smaller_picture_has_the_most_tokens_that_meet_the_cut():
    (arm,) = plan_of([], [0.5], ("smaller",), 3)[1:]
    assert arm.policy is None and arm.for_batch(0, [None]) is None
    tokens = int(arm.smaller.keep * 196 + 1e-6)
    assert cost(PROMPT, [(0, tokens)])[0] >= 0.5 > cost(PROMPT, [(0, tokens + 1)])[0]


@pytest.mark.parametrize("method, gone", [("vtw:layer=4", 3), ("vtw:layer=0", 4), ("fastv:layer=4", 0)])
def test_a_baseline_that_cannot_save_as_much_as_a_policy_is_left_out(method, gone):
    """What keeps one token cannot save what a policy does that keeps none."""
    methods, why = {method: policy_from(method)}, []
    arms = make_arms(methods, (), BASELINES, 1, PROMPT, why)
    assert [arm.method for arm in arms[:2]] == [UNPRUNED, method] and len(arms) == 6 - gone
    assert len(why) == gone and all("at budget" in reason for reason in why)
    if gone:
        with pytest.raises(
            ValueError, match=r"^uniform:layer=\d at budget 0\.\d+: cut: expected a share between"
        ):
            plan_of([method], (), BASELINES, 1)


def test_an_unknown_baseline():
    with pytest.raises(
        ValueError, match=r"^baselines: expected some of lattice, raster, random, smaller, got 'best'$"
    ):
        plan_of([], [0.5], ("best",), 1)


@pytest.mark.parametrize(
    "method, budget, said",
    [
        (
            "sparsevlm:version=paper",
            0.5,
            r"^sparsevlm:version=paper at budget 0.5: keep: expected \(\) for version 'paper'",
        ),
        (
            "fastv:layer=6",
            0.5,
            r"^fastv:layer=6 at budget 0.5: cut: expected a share between 0.0000 and 0\.\d+",
        ),
        ("uniform:stride=2", 0.5, r"^uniform:stride=2 at budget 0.5: keep: expected either keep or stride"),
        ("fastvv", 0.5, r"^policy: expected one of"),
    ],
)
def test_impossible(method, budget, said):
    with pytest.raises(ValueError, match=said):
        plan_of([method], [budget], BOTH, 1)


def test_what_draws_inside_another_policy_draws_anew():
    """A selection of ACCM's, a stage, one of a pair; what draws nothing stays the same object."""
    drawing = Random(layer=0, keep=4)
    for policy in (
        ACCM(drawing, echo, keep=4),
        Stages([ACCM(drawing, echo, keep=4), FastV()]),
        drawing | Uniform(layer=0),
    ):
        one, two = (Arm("drawn", policy=policy).for_batch(number, []) for number in (0, 1))
        assert one == policy != two
    still = ACCM(Uniform(layer=0), echo, keep=4)
    assert Arm("still", policy=still).for_batch(1, []) is still

"""Custom policies: any function works, and a wrong answer is named with its sample."""

import dataclasses
import pickle

import pytest
import torch

from helpers.contexts import case
from helpers.device import placed
from vlmprune.policies import Custom, Needs, Stages


def first_two(ctx):
    return torch.where(ctx.mask[:, :2], torch.arange(2), -1)


def test_keeps_what_the_function_says():
    ctx = case(["square", "none"]).ctx
    assert Custom(2, first_two).select(ctx).tolist() == [[0, 1], [-1, -1]]


def test_drops_columns_that_are_padding_everywhere():
    index = torch.tensor([[0, 4, -1, -1], [3, -1, -1, -1]])
    assert Custom(2, lambda ctx: index).select(case(["square", "two"]).ctx).tolist() == [[0, 4], [3, -1]]


def test_sees_hidden_states_and_attention():
    assert Custom(2, first_two).needs(2) == Needs(hidden=True, attention="previous")
    assert Custom(0, first_two).needs(0) == Needs(hidden=True)


@pytest.mark.parametrize(
    "answer, message",
    [
        ([[0], [1]], r"^select\(ctx\): expected an int64 tensor \[2, K\] or a Reduction, got list$"),
        (torch.tensor([[0], [1]], dtype=torch.int32), r"^select\(ctx\): expected int64, got torch\.int32$"),
        (torch.tensor([0, 1]), r"^select\(ctx\): expected \[2, K\], got \[2\]$"),
        (torch.tensor([[0, 1]]), r"^select\(ctx\): expected \[2, K\], got \[1, 2\]$"),
        (
            torch.zeros(2, 1, dtype=torch.int64, device="meta"),
            r"^select\(ctx\): expected a tensor on cpu, got meta$",
        ),
        (
            torch.tensor([[0, 1], [1, 0]]),
            r"^select\(ctx\), sample 1: expected ascending numbers .*, got \[\(1, 0\)\]$",
        ),
        (
            torch.tensor([[0, 0], [0, 1]]),
            r"^select\(ctx\), sample 0: expected each number once, got \[0\] again$",
        ),
        (
            torch.tensor([[0, 36], [0, 1]]),
            r"^select\(ctx\), sample 0: expected numbers 0 to 35 of its tokens, got \[36\]",
        ),
        (
            torch.tensor([[-2, 3], [0, 1]]),
            r"^select\(ctx\), sample 0: expected numbers 0 to 35 of its tokens, got \[-2\]",
        ),
        (
            torch.tensor([[0, 1], [20, 21]]),
            r"^select\(ctx\), sample 1: expected numbers 0 to 20 of its tokens, got \[21\]",
        ),
        (
            torch.tensor([[-1, 3], [0, 1]]),
            r"^select\(ctx\), sample 0: expected -1 only on the right, got -1 before \[3\]$",
        ),
        (
            torch.tensor([[0], [-1]]),
            r"^select\(ctx\), sample 1: expected at least one of its 21 tokens, got none$",
        ),
    ],
)
def test_rejects_answers(answer, message):
    ctx = case(["square", "tall"]).ctx
    if isinstance(answer, torch.Tensor) and not answer.is_meta:
        answer = placed(answer)
    with pytest.raises(ValueError, match=message.replace("on cpu", f"on {ctx.device}")):
        Custom(2, lambda ctx: answer).select(ctx)


def test_a_sample_without_images_keeps_nothing():
    with pytest.raises(ValueError, match=r"^select\(ctx\), sample 1: expected nothing, .*, got \[0\]$"):
        Custom(2, lambda ctx: torch.zeros(2, 1, dtype=torch.int64)).select(case(["square", "none"]).ctx)


def test_is_a_value_like_every_policy():
    """Its settings are its arguments; a copy checks answers as the original does, once."""
    policy = Custom(2, first_two)
    moved = dataclasses.replace(policy, layer=3)
    assert moved == Custom(layer=3, select=first_two) and hash(moved) == hash(Custom(3, first_two))
    assert repr(moved) == "Custom(earlier_kv='full', rectify=False, layer=3, select=first_two)"
    assert dataclasses.replace(policy, select=len) == Custom(2, len) != policy
    assert [field.name for field in dataclasses.fields(policy)] == [
        "earlier_kv",
        "rectify",
        "layer",
        "select",
    ]
    assert pickle.loads(pickle.dumps(moved)) == moved
    kept = dataclasses.replace(policy, earlier_kv="compact")
    assert kept.earlier_kv == "compact" and Stages([kept], earlier_kv="compact").layers == (2,)
    wrong = dataclasses.replace(policy, select=lambda ctx: torch.tensor([[1, 0]]))
    with pytest.raises(ValueError, match="ascending"):
        wrong.select(case(["square"]).ctx)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.select = len


def test_rejects_settings():
    with pytest.raises(
        ValueError, match=r"^select: expected a callable that takes a TokenContext, got None$"
    ):
        Custom(layer=2)
    with pytest.raises(ValueError, match=r"^select: expected a callable that takes a TokenContext, got 3$"):
        Custom(layer=2, select=3)
    with pytest.raises(ValueError, match=r"^layer: expected a whole number >= 0, got -1$"):
        Custom(layer=-1, select=first_two)

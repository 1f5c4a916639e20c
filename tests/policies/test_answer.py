"""What a policy may choose: every fault has its own words, with the policy, the sample and a hint."""

import re
from dataclasses import replace

import pytest
import torch

from vlmprune import ops
from vlmprune.policies import Needs, Reduction
from vlmprune.policies.answer import check_index, check_selection
from vlmprune.testing.context import make_context

pytestmark = pytest.mark.cpu("answers are made as the file is read; test_custom.py tries some on a device")

CTX = make_context(Needs(hidden=True), [[(3, 4)], [(2, 2), (2, 1)], []], 2)  # 12, 6 and 0 tokens
GOOD = [[0, 4, 11], [5, -1, -1], [-1, -1, -1]]


def index(*rows):
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "choice",
    [
        index(*GOOD),
        Reduction(index(*GOOD)),
        Reduction(index([11, 0, 4], [5, 0, -1], [-1, -1, -1]), CTX.hidden[:, :3], "pack"),
    ],
    ids=["index", "reduction", "reordered"],
)
def test_accepts(choice):
    check_selection(choice, CTX, "P()")


def test_accepts_nothing_of_nothing():
    ctx = make_context(Needs(), [[], []], 2)
    check_selection(torch.empty(2, 0, dtype=torch.int64), ctx, "P()")
    check_selection(ctx.positions, ctx, "P()")


@pytest.mark.parametrize(
    "choice, message",
    [
        (
            None,
            "P().select(ctx): expected an int64 tensor [3, K] or a Reduction, got None (is a return missing?)",
        ),
        (GOOD, "P().select(ctx): expected an int64 tensor [3, K] or a Reduction, got list"),
        (
            ops.select_topk(torch.rand(3, 12), 4),
            "P().select(ctx): expected an int64 tensor [3, K] or a Reduction, "
            "got a tuple of 2 (select_topk returns two: did you forget [0]?)",
        ),
        (
            CTX.mask,
            "P().select(ctx): expected int64, got a bool mask (give the numbers of the tokens that stay)",
        ),
        (CTX.hidden[..., 0], "P().select(ctx): expected int64, got torch.float32 (scores?)"),
        (index(*GOOD).int(), "P().select(ctx): expected int64, got torch.int32"),
        (torch.arange(3), "P().select(ctx): expected [3, K], got [3]"),
        (index([0, 1]), "P().select(ctx): expected [3, K], got [1, 2]"),
        (index(*GOOD).to("meta"), "P().select(ctx): expected a tensor on cpu, got meta"),
        (
            CTX.positions[:, :1],
            "P().select(ctx): expected numbers among the entering tokens, got ctx.positions",
        ),
        (
            index([1, -1], [-1, 3], [-1, -1]),
            "P().select(ctx), sample 1: expected -1 only on the right, got -1 before [3]",
        ),
        (
            index([0, 12], [0, 1], [-1, -1]),
            "P().select(ctx), sample 0: expected numbers 0 to 11 of its tokens, got [12]",
        ),
        (
            index([0, 11], [-2, 1], [-1, -1]),
            "P().select(ctx), sample 1: expected numbers 0 to 5 of its tokens, got [-2]",
        ),
        (
            index([0, 1], [3, 9], [-1, -1]),
            "P().select(ctx), sample 1: expected numbers 0 to 5 of its tokens, "
            "got [9]: these are ctx.positions, not numbers among the entering tokens",
        ),
        (
            index([0, 1], [0, 1], [0, -1]),
            "P().select(ctx), sample 2: expected nothing, as it has no visual tokens, got [0]",
        ),
        (
            index([0, 1, 5], [2, 3, 3], [-1, -1, -1]),
            "P().select(ctx), sample 1: expected each number once, got [3] again",
        ),
        (
            index([0, 5, 1], [2, -1, -1], [-1, -1, -1]),
            "P().select(ctx), sample 0: expected ascending numbers (a Reduction may reorder), got [(5, 1)]",
        ),
        (
            index([0, 5], [-1, -1], [-1, -1]),
            "P().select(ctx), sample 1: expected at least one of its 6 tokens, got none",
        ),
        (
            torch.empty(3, 0, dtype=torch.int64),
            "P().select(ctx), sample 0: expected at least one of its 12 tokens, got none",
        ),
        (
            index([0, 5, -1], [1, -1, -1], [-1, -1, -1]),
            "P().select(ctx): expected the 2 columns that the fullest sample uses, "
            "got 1 more that are -1 everywhere (cut them off: index[:, :2])",
        ),
        (
            Reduction(index([5, 0, 5], *GOOD[1:])),
            "P().select(ctx), sample 0: expected each number once, got [5] again",
        ),
        (
            Reduction(index(*GOOD), positions="packed"),
            "P().select(ctx).positions: expected 'keep' or 'pack', got 'packed'",
        ),
        (
            Reduction(None),
            "P().select(ctx): expected an int64 tensor [3, K] or a Reduction, got None (is a return missing?)",
        ),
        (Reduction(index(*GOOD), [1]), "P().select(ctx).hidden: expected a tensor [3, 3, 8], got list"),
        (Reduction(index(*GOOD), CTX.hidden), "P().select(ctx).hidden: expected [3, 3, 8], got [3, 12, 8]"),
        (
            Reduction(index(*GOOD), CTX.hidden[:, :3, :5]),
            "P().select(ctx).hidden: expected [3, 3, 8], got [3, 3, 5]",
        ),
        (
            Reduction(index(*GOOD), CTX.hidden[:, :3].half()),
            "P().select(ctx).hidden: expected torch.float32, got torch.float16",
        ),
        (
            Reduction(index(*GOOD), CTX.hidden[:, :3].to("meta")),
            "P().select(ctx).hidden: expected a tensor on cpu, got meta",
        ),
        (
            Reduction(index(*GOOD), merged=index(*GOOD)),
            "P().select(ctx).merged: expected an int64 tensor [3, 12], got torch.int64 [3, 3]",
        ),
        (
            Reduction(index(*GOOD), merged=torch.full((3, 12), 11)),
            "P().select(ctx).merged, sample 1: expected -1, or numbers in its index, got [11]",
        ),
    ],
)
def test_refuses(choice, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_selection(choice, CTX, "P()")


def test_numbers_from_before_an_earlier_stage():
    ctx = make_context(Needs(), [[(3, 4)]], 2, kept=[[1, 6, 11]])
    message = r"expected numbers 0 to 2 of its tokens, got \[6\]: these are ctx\.ordinals, not"
    with pytest.raises(ValueError, match=message):
        check_selection(torch.tensor([[1, 6]]), ctx, "P()")


def test_new_rows_without_hidden_states_in_the_context():
    """The stage knows what enters it, also where the policy did not ask."""
    ctx, like = replace(CTX, hidden=None), CTX.hidden.half()
    rows = Reduction(index(*GOOD), CTX.hidden[:, :3])
    check_selection(rows, ctx, "P()")
    with pytest.raises(ValueError, match=r"hidden: expected torch\.float16, got torch\.float32$"):
        check_selection(rows, ctx, "P()", like=like)
    with pytest.raises(ValueError, match=r"hidden: expected torch\.float32, got torch\.float16$"):
        check_selection(replace(rows, hidden=like[:, :3]), CTX, "P()")
    with pytest.raises(ValueError, match=r"hidden: expected \[3, 3\] \+ \[D\], got \[3, 4, 8\]$"):
        check_selection(replace(rows, hidden=like[:, :4]), ctx, "P()")


def test_reads_the_device_once(monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or tolist(x))
    choice = index(*GOOD)
    check_selection(choice, CTX, "P()")
    assert len(reads) == 1 and reads[0] is choice


def test_check_index_counts_the_columns_in_use():
    assert check_index(index([0, 5, -1], [1, -1, -1], [-1, -1, -1]), CTX, "P()") == 2

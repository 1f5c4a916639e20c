"""check_policy: passes a right policy with a list of what it tried, and names the slip of each wrong one."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from vlmprune import ops
from vlmprune.errors import InputError
from vlmprune.policies import (
    Custom,
    FastV,
    Needs,
    PruningPolicy,
    Random,
    Ranking,
    Reduction,
    VisionZip,
    quotas,
    select_scores,
)
from vlmprune.testing import check_policy

ROOT = Path(__file__).parents[2]
HIDDEN = Needs(hidden=True)


def norms(ctx):
    return ctx.hidden.float().norm(dim=-1)


def best(ctx):
    return select_scores(norms(ctx), ctx, 0.3)


def shortened(index, ctx):
    return index[:, : max(quotas(ctx, 0.3))]


@dataclass(frozen=True)
class Mine(PruningPolicy):
    """A policy of somebody else, right but for what its function does."""

    function: Callable = best
    reads: Needs = HIDDEN

    @property
    def layers(self):
        return (2,)

    def needs(self, layer):
        return self.reads

    def select(self, ctx):
        return self.function(ctx)


def test_a_right_one():
    ran = check_policy(Mine(), keep_all=Mine(lambda ctx: select_scores(norms(ctx), ctx, 1.0)))
    assert len(set(ran)) == len(ran)
    assert {
        "layer 2, one token",
        "layer 2, no visual tokens",
        "layer 2, a padded batch",
        "layer 2, a cached past",
        "layer 2, few distinct values",
        "layer 2, no text after the image",
        "layer 2, after an earlier stage",
        "layer 2, half an image, as prefill in chunks has it",
        "layer 2, in bfloat16",
        "layer 2, nan in everything",
        "layer 2, inf in one token of hidden",
        "layer 2, alone and in a batch of 3",
        "layer 2, keep_all, several images",
        "settings are a value",
    } <= set(ran)


def like_the_last_word(ctx, last):
    """Tokens most like the last word, said to stand at ``last(ctx)`` of each text; none: all alike."""
    if not ctx.text_hidden.shape[1]:
        return select_scores(torch.zeros(ctx.mask.shape), ctx, 0.3)
    words = ctx.text_hidden.float()[torch.arange(len(ctx.counts)), last(ctx)]
    return select_scores((ctx.hidden.float() @ words[..., None])[..., 0], ctx, 0.3)


def test_padding_of_shorter_texts_counts():
    """Texts are padded on the right: the last column is a word of the longest one alone."""
    needs = Needs(hidden=True, text=True)
    right = Mine(
        lambda ctx: like_the_last_word(ctx, lambda ctx: ((ctx.text >= 0).sum(1) - 1).clamp(min=0)),
        reads=needs,
    )
    assert "layer 2, alone and in a batch of 2, beside a longer text" in check_policy(right)
    wrong = Mine(lambda ctx: like_the_last_word(ctx, lambda ctx: -1), reads=needs)
    with pytest.raises(
        InputError, match=r"^layer 2, alone and in a batch of \d.*, sample 0: expected what it gets alone"
    ):
        check_policy(wrong)


def test_cases_follow_needs():
    tower, deep = check_policy(VisionZip(dominant=5, positions="pack")), check_policy(FastV())
    assert "layer 0, a tower without CLS" in tower and "layer 0, inf in one token of vision[-2].key" in tower
    assert "layer 0, after an earlier stage" not in tower and "layer 0, images of unequal size" not in tower
    assert "layer 2, images of unequal size" in deep and "layer 2, nan in one token of query" in deep


# What somebody may write, and what it is told.
SLIPS = {
    "select_topk without [0]": (
        lambda ctx: ops.select_topk(norms(ctx), 1),
        r"^layer 2, one image: Mine\(.*\)\.select\(ctx\): expected an int64 tensor \[1, K\] or a Reduction, "
        r"got a tuple of 2 \(select_topk returns two: did you forget \[0\]\?\)$",
    ),
    "torch.topk's order": (
        lambda ctx: norms(ctx).topk(6, dim=1).indices,
        r"^layer 2, one image: .*, sample 0: expected ascending numbers \(a Reduction may reorder\), got",
    ),
    "duplicates": (
        lambda ctx: torch.cat([best(ctx)] * 2, 1).sort(dim=1).values,
        r"^layer 2, one image: .*, sample 0: expected each number once, got \[\d+\] again$",
    ),
    "a slice of the positions": (
        lambda ctx: ctx.positions[:, :6],
        r"^layer 2, one image: .*: expected numbers among the entering tokens, got ctx\.positions$",
    ),
    "positions": (
        lambda ctx: ctx.positions.gather(1, best(ctx).clamp(min=0)),
        r"^layer 2, .*, sample 0: expected numbers 0 to \d+ of its tokens, got \[\d+\]: these are ctx\.positions, ",
    ),
    "ordinals": (
        lambda ctx: ctx.ordinals.gather(1, best(ctx).clamp(min=0)).where(best(ctx) >= 0, -1),
        r"^layer 2, after an earlier stage: .*, got \[\d+\]: these are ctx\.ordinals, ",
    ),
    "out of range": (
        lambda ctx: torch.tensor([[0, 1, 99]]),
        r"^layer 2, one image: .*, sample 0: expected numbers 0 to 19 of its tokens, got \[99\]$",
    ),
    "one dimension": (lambda ctx: torch.arange(6), r": expected \[1, K\], got \[6\]$"),
    "a mask": (lambda ctx: ctx.hidden[..., 0] > 0, r": expected int64, got a bool mask \(give the numbers"),
    "scores": (norms, r": expected int64, got torch\.float32 \(scores\?\)$"),
    "nothing": (
        lambda ctx: torch.empty(1, 0, dtype=torch.int64),
        r", sample 0: expected at least one of its 20 tokens, got none$",
    ),
    "None": (lambda ctx: None, r"got None \(is a return missing\?\)$"),
    "a hole": (
        lambda ctx: torch.tensor([[0, -1, 2, 3]]),
        r", sample 0: expected -1 only on the right, got -1 before \[2\]$",
    ),
    "padding that nobody needs": (
        lambda ctx: ops.select_topk(
            norms(ctx), torch.tensor(quotas(ctx, 0.3)), code=torch.where(ctx.mask, 0, 2).to(torch.int8)
        )[0],
        r": expected the 6 columns that the fullest sample uses, got 14 more that are -1 everywhere",
    ),
    "no care for padding": (
        lambda ctx: ops.select_topk(norms(ctx), max(quotas(ctx, 0.3)))[0],
        r"^layer 2, a padded batch: .*, sample 1: expected nothing, as it has no visual tokens, got",
    ),
    "a constant number": (
        lambda ctx: ops.select_topk(norms(ctx), 6)[0] if ctx.mask.shape[1] >= 6 else torch.arange(6)[None],
        r"^layer 2, one token: .*, sample 0: expected numbers 0 to 0 of its tokens, got \[1\]$",
    ),
    "a mean over the batch": (
        lambda ctx: select_scores(
            (ctx.hidden.float() - ctx.hidden.float().mean((0, 1))).norm(dim=-1), ctx, 0.3
        ),
        r"^layer 2, nan in everything of sample 1: .*, sample 0: expected what it gets beside a sound one, \[.*\], got \[",
    ),
    "a sum over the batch": (
        lambda ctx: select_scores((norms(ctx) - norms(ctx).nan_to_num().sum() / 90).abs(), ctx, 0.3),
        r"^layer 2, nan in everything of sample 1: .*, sample 0: expected what it gets beside a sound one, ",
    ),
    "the padding counts": (
        lambda ctx: select_scores((norms(ctx) - norms(ctx).mean(1, keepdim=True)).abs(), ctx, 0.3),
        r"^layer 2, alone and in a batch of 3: .*, sample 0: expected what it gets alone, \[.*\], got \[",
    ),
    "chance": (
        lambda ctx: select_scores(torch.rand(ctx.mask.shape), ctx, 0.3),
        r"^layer 2, one image: .*, asked again, sample 0: expected what it was, \[.*\], got \[",
    ),
    "writes": (
        lambda ctx: select_scores(ctx.hidden.mul_(2).float().norm(dim=-1), ctx, 0.3),
        r"^layer 2, one image: .*: expected ctx\.hidden as it was, got other values written to it$",
    ),
    "rows of another width": (
        lambda ctx: Reduction(best(ctx), ctx.hidden[:, : best(ctx).shape[1], :3]),
        r"\.hidden: expected \[1, 6, 8\], got \[1, 6, 3\]$",
    ),
    "rows of another precision": (
        lambda ctx: Reduction(best(ctx), ops.gather_tokens([ctx.hidden], best(ctx))[0].float()),
        r"^layer 2, in float16: .*\.hidden: expected torch\.float16, got torch\.float32$",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_names_the_slip(slip):
    function, message = SLIPS[slip]
    with pytest.raises(ValueError, match=message):
        check_policy(Mine(function))


def test_what_select_raises_comes_with_its_case():
    """Something not declared is None; a routine that cannot take NaN ends everybody's batch."""
    with pytest.raises(AttributeError) as error:
        check_policy(Mine(reads=Needs()))
    assert re.match(
        r"layer 2, one image: Mine\(.*\) with Needs\(hidden=False, .*is None$", error.value.__notes__[0]
    )

    def rank(ctx):
        return select_scores(
            norms(ctx), ctx, 1 / (1 + float(torch.linalg.matrix_rank(ctx.hidden.float()).sum()))
        )

    with pytest.raises(torch.linalg.LinAlgError) as error:
        check_policy(Mine(rank))
    assert error.value.__notes__[0].startswith("layer 2, nan in everything: ")


def test_keep_all():
    message = r"^layer 2, keep_all, one image: Mine\(.*\)\.select\(ctx\), sample 0: expected all 20 tokens, got \[\d+, "
    with pytest.raises(ValueError, match=message):
        check_policy(Mine(), keep_all=Mine())
    with pytest.raises(ValueError, match=r"^keep_all: expected a PruningPolicy or None, got 1\.0$"):
        check_policy(Mine(), keep_all=1.0)


@dataclass(frozen=True)
class Lists(Mine):
    numbers: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Deaf(PruningPolicy):
    """Right in all that the classes below do otherwise."""

    layers: tuple = (2,)

    def select(self, ctx):
        return Random(layer=2).select(ctx)


class Lonely(Deaf):
    __eq__, __hash__ = object.__eq__, object.__hash__


@dataclass(frozen=True)
class Mute(Deaf):
    def __repr__(self):
        return "Mute!"


class Open(Deaf):
    """Keeps something beside its settings."""

    def __init__(self, extra=3):
        super().__init__()
        object.__setattr__(self, "extra", extra)


@dataclass(frozen=True)
class Counted(Deaf):
    """Made from another argument than its field."""

    numbers: int = 0

    def __init__(self, first=0):
        object.__setattr__(self, "numbers", first)
        object.__setattr__(self, "layers", (2,))
        object.__setattr__(self, "earlier_kv", "full")


class Soft(Deaf):
    """Lets its settings be changed."""

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


@pytest.mark.parametrize(
    "policy, message",
    [
        (FastV, r"^policy: expected a PruningPolicy, got <class"),
        (Deaf(layers=()), r"^layers: expected one or more layers, ascending, got \(\)$"),
        (Deaf(layers={2}), r"^layers: expected one or more layers, ascending, got \{2\}$"),
        (Deaf(layers=(3, 2)), r"^layers: expected one or more layers, ascending, got \(3, 2\)$"),
        (Deaf(layers=(-1,)), r"^layer: expected a whole number >= 0, got -1$"),
        (Mine(reads=None), r"\.needs\(2\): expected Needs\(\.\.\.\), got None$"),
        (Open(), r"^Open\(.*\): expected attributes that are fields of a dataclass, got \['extra'\]$"),
        (Soft(), r"^Soft\(.*\): expected a class under @dataclass\(frozen=True\), got one that can change$"),
        (Lonely(), r"^Lonely\(.*\): expected an equal copy from dataclasses\.replace, got Lonely\("),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_refuses(policy, message):
    with pytest.raises(ValueError, match=message):
        check_policy(policy)


def test_what_python_says_about_settings_comes_with_a_note():
    @dataclass(frozen=True)
    class Local(Deaf):
        pass

    for policy, kind, note in (
        (Lists(), TypeError, r"^hash\(Lists\(.*\)\): settings must be hashable, for example tuples"),
        (
            Local(),
            (AttributeError, pickle_error()),
            r"must survive pickle: its class stands at the top of a module$",
        ),
        (
            Counted(),
            TypeError,
            r"^dataclasses\.replace\(Counted\(.*\)\) must make the same policy: a field is",
        ),
        (Mute(), SyntaxError, r"^repr Mute! must spell a call that makes the policy$"),
    ):
        with pytest.raises(kind) as error:
            check_policy(policy)
        assert re.search(note, error.value.__notes__[-1])


def pickle_error():
    import pickle

    return pickle.PicklingError


def test_a_function_need_not_pickle():
    assert (
        check_policy(Custom(2, lambda ctx: select_scores(norms(ctx), ctx, 4)))[-1] == "settings are a value"
    )


def test_needs_neither_transformers_nor_pytest():
    code = (
        "import sys; from vlmprune import FastV, testing; testing.check_policy(FastV());"
        "print(sorted({'transformers', 'pytest'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_unknown_name():
    from vlmprune import testing

    with pytest.raises(
        AttributeError, match=r"^module 'vlmprune\.testing' has no attribute 'check_everything'$"
    ):
        testing.check_everything  # noqa: B018


@dataclass(frozen=True)
class Hasty(PruningPolicy):
    """Says of a ranking that it is static, whose ``field`` goes by what is in tensors."""

    field: str = ""
    layer: int = 2
    keep: float = 0.5

    def needs(self, layer):
        return Needs(hidden=True, attention="previous")

    def rank(self, ctx):
        seen, counts = ctx.attention, tuple(quotas(ctx, self))
        high = [bool((row > 0).sum() * 2 > row.numel()) for row in ctx.hidden.float().mean(-1)]
        scores, how = seen.rating(seen.last), {}
        if self.field == "keep":
            counts = tuple(max(1, n // 2) if n and odd else n for n, odd in zip(counts, high, strict=True))
        elif self.field == "scores":
            scores = ctx.hidden.float().mean(-1)
        elif self.field == "rating":
            scores = seen.rating(seen.last, head_reduce="max" if any(high) else "sum")
        elif self.field == "code":
            how = {"code": (ctx.hidden.float().mean(-1) > 0).to(torch.int8) * 3, "extra": ctx.counts}
        return Ranking(scores, counts, static=True, **how)


@pytest.mark.parametrize("field", ["keep", "scores", "rating", "code"])
def test_a_ranking_that_is_not_static(field):
    name = "scores" if field == "rating" else field
    with pytest.raises(
        ValueError, match=rf"rank\(ctx\)\.{name}: expected .* for other values too, as static says"
    ):
        check_policy(Hasty(field))


@dataclass(frozen=True)
class Short(PruningPolicy):
    """Lets one token more stay than it says, which a running model refuses."""

    layer: int = 2

    def rank(self, ctx):
        counts = tuple(min(1, n) for n in ctx.counts)
        return Ranking(ctx.mask.float(), counts, code=3 * ctx.mask.to(torch.int8), extra=counts)


def test_a_ranking_that_no_model_would_take():
    with pytest.raises(
        InputError, match=r"^layer 2, one image: Short\(.*\)\.rank\(ctx\)\.code, sample 0: .*, got 20$"
    ):
        check_policy(Short())


def test_a_ranking_that_is():
    assert "layer 2, one image" in check_policy(Hasty())

"""``check_policy``: holds a pruning policy to everything that ours are held to, without a model."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.answer import check_ranking, check_selection
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.checks import check_layers
from vlmprune.policies.inputs import Rating
from vlmprune.testing.context import make_context
from vlmprune.testing.context_changes import broken, copied, first_alone, inputs_of, with_other_values
from vlmprune.testing.policy_cases import FLAT, TALL, WIDE, situations


def check_policy(policy: PruningPolicy, keep_all: PruningPolicy | None = None) -> list[str]:
    """Ask a policy in every situation that its ``needs`` allow, and check what it chooses.

    At each of its layers: one image, one token, none, several images, a padded batch, a cached past, ties, no text
    after the image, half precision, after an earlier stage. A choice must be valid (``policies.answer``), the same when
    asked again, and leave the context as it was. A sample in a batch must get what it gets alone, and what it gets
    beside a sample full of NaN or infinities, which itself must get some valid choice. A ranking that says it is static must
    be the same whatever the tensors hold. The settings must be a value.

    Args:
        policy: with settings that fit images of 20 tokens.
        keep_all: the same method with settings by which every token stays, if there are any; checked for that.

    Returns:
        What ran, for example ``"layer 2, one token"``.

    Raises:
        InputError: what is wrong, in which case. What ``select`` itself raises passes, with the case as a note.

    Example:
        >>> from vlmprune import FastV, testing
        >>> testing.check_policy(FastV(layer=2, keep=0.5), keep_all=FastV(keep=1.0))[0]
        'layer 2, one image'
    """
    check(isinstance(policy, PruningPolicy), "policy", "a PruningPolicy", repr(policy))
    check_layers(policy.layers, 0)
    ran = [name for layer in policy.layers for name in _check_stage(policy, layer)]
    if keep_all is not None:
        check(isinstance(keep_all, PruningPolicy), "keep_all", "a PruningPolicy or None", repr(keep_all))
        check_layers(keep_all.layers, 0)
        ran += [name for layer in keep_all.layers for name in _check_all_stay(keep_all, layer)]
    _check_value(policy)
    return [*ran, "settings are a value"]


def _check_stage(policy: PruningPolicy, layer: int) -> Iterator[str]:
    """Everything that holds at one layer; yields the name of each case."""
    needs = policy.needs(layer)
    check(isinstance(needs, Needs), f"{policy!r}.needs({layer})", "Needs(...)", repr(needs))
    for name, ctx in situations(needs, layer):
        case = f"layer {layer}, {name}"
        first, again = _ask(policy, ctx, case), _ask(policy, ctx, case)
        for sample in range(len(ctx.counts)):
            who = f"{case}: {policy!r}.select(ctx), asked again, sample {sample}"
            _expect_same(again, first, sample, who, "what it was")
        if policy.ranks(layer):
            _check_rank(policy, ctx, f"{case}: {policy!r}.rank(ctx)")
        yield case
    yield from _check_broken(policy, needs, layer)
    yield from _check_alone(policy, needs, layer)


def _check_rank(policy: PruningPolicy, ctx: TokenContext, who: str) -> None:
    """A ranking must be valid; one that says so is the same for other values in tensors of the same shapes, beside the attention it reads."""
    ranking, other = policy.rank(copied(ctx)), policy.rank(with_other_values(ctx))
    check_ranking(ranking, ctx, who.removesuffix(".rank(ctx)"), policy.empties(ctx.layer))
    if not ranking.static:
        return
    for f in fields(ranking):
        one, two = (_numbers(getattr(r, f.name)) for r in (ranking, other))
        check(one == two, f"{who}.{f.name}", f"{one} for other values too, as static says", two)


def _numbers(value: Any) -> Any:
    """What a field of a ranking says; of a Rating all but the tensors that it reads."""
    if isinstance(value, Rating):
        value = [type(x).__name__ if isinstance(x, Tensor) else x for x in value.scoring]
    return value.tolist() if isinstance(value, Tensor) else value


def _check_all_stay(policy: PruningPolicy, layer: int) -> Iterator[str]:
    """No token goes at this layer, whatever the situation."""
    for name, ctx in situations(policy.needs(layer), layer):
        case = f"layer {layer}, keep_all, {name}"
        choice = _ask(policy, ctx, case)
        for sample, tokens in enumerate(ctx.counts):
            kept, who = sorted(_kept(choice, sample)), f"{case}: {policy!r}.select(ctx), sample {sample}"
            check(kept == list(range(tokens)), who, f"all {tokens} tokens", kept)
        yield case


def _check_alone(policy: PruningPolicy, needs: Needs, layer: int) -> Iterator[str]:
    """A sample's choice depends neither on those beside it nor on the padding that they bring."""
    for beside, after in (([[WIDE, FLAT, TALL], []], None), ([[TALL]], None), ([[TALL]], (2, 9))):
        longer = "" if after is None else ", beside a longer text"
        case = f"layer {layer}, alone and in a batch of {1 + len(beside)}{longer}"
        ctx = make_context(needs, [[WIDE, FLAT], *beside], layer, after=after)
        batch, alone = _ask(policy, ctx, case), _ask(policy, first_alone(ctx), case)
        _expect_same(batch, alone, 0, f"{case}: {policy!r}.select(ctx), sample 0", "what it gets alone")
        yield case


def _check_broken(policy: PruningPolicy, needs: Needs, layer: int) -> Iterator[str]:
    """A sample with a token or full of NaN or infinities gets a valid choice, and its neighbours what they had."""
    one = make_context(needs, [[WIDE]], layer)
    three = make_context(needs, [[TALL], [WIDE, FLAT], [FLAT]], layer)
    sound = _ask(policy, three, f"layer {layer}, three samples")
    for value, where in product((float("nan"), float("inf")), (None, *inputs_of(one))):
        case = f"layer {layer}, {value} in {'everything' if where is None else f'one token of {where}'}"
        _ask(policy, broken(one, 0, value, where), case)
        beside = _ask(policy, broken(three, 1, value, where), case)
        for sample in (0, 2):
            who = f"{case} of sample 1: {policy!r}.select(ctx), sample {sample}"
            _expect_same(beside, sound, sample, who, "what it gets beside a sound one")
        yield case


def _ask(policy: PruningPolicy, ctx: TokenContext, case: str) -> Reduction:
    """A valid choice. Raises InputError for another one, and if the policy writes into its context."""
    own = copied(ctx)
    declared = policy.needs(ctx.layer)
    with _noted(f"{case}: {policy!r}.select(ctx) with {declared}; what is not declared is None"):
        choice = policy.select(own)
    before = _tensors(ctx)
    for name, x in _tensors(own).items():
        same = torch.equal(x.nan_to_num(), before[name].nan_to_num())
        check(same, f"{case}: {policy!r}.select(ctx)", f"ctx.{name} as it was", "other values written to it")
    check_selection(choice, own, f"{case}: {policy!r}", empties=policy.empties(ctx.layer))
    return choice if isinstance(choice, Reduction) else Reduction(choice)


def _tensors(ctx: TokenContext) -> dict[str, Tensor]:
    """Everything a policy could write to."""
    return inputs_of(ctx) | {"mask": ctx.mask, "ordinals": ctx.ordinals, "positions": ctx.positions}


def _kept(choice: Reduction, sample: int) -> list[int]:
    """One sample's kept numbers without padding."""
    return [i for i in choice.index[sample].tolist() if i >= 0]


def _expect_same(choice: Reduction, other: Reduction, sample: int, who: str, expected: str) -> None:
    """Raise InputError unless a sample has the same tokens and rows in both choices."""
    kept, wanted = _kept(choice, sample), _kept(other, sample)
    check(kept == wanted, who, f"{expected}, {wanted}", kept)
    if choice.hidden is not None and other.hidden is not None:
        rows, right = (x[sample, : len(kept)].float() for x in (choice.hidden, other.hidden))
        close = torch.allclose(rows, right, rtol=1e-4, atol=1e-5, equal_nan=True)
        check(close, who, f"{expected}, with the same rows", "other rows")


@contextmanager
def _noted(note: str) -> Iterator[None]:
    """Adds a note to whatever is raised in its block."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


def _check_value(policy: PruningPolicy) -> None:
    """Raise InputError unless the policy is a value; one that holds a function need not pickle or be read back."""
    who, names = f"{policy!r}", [f.name for f in fields(policy)]
    more = sorted(vars(policy).keys() - set(names))
    check(not more, who, "attributes that are fields of a dataclass", more)
    frozen = _is_frozen(policy, names[0])
    check(frozen, who, "a class under @dataclass(frozen=True)", "one that can change")
    with _noted(f"hash({who}): settings must be hashable, for example tuples in place of lists"):
        hash(policy)
    with _noted(f"dataclasses.replace({who}) must make the same policy: a field is an argument of that name"):
        same = replace(policy)
    check(same == policy, who, "an equal copy from dataclasses.replace", repr(same))
    parts = list(_parts(policy))
    if any(callable(part) for part in parts):
        return
    with _noted(f"{who} must survive pickle: its class stands at the top of a module"):
        copy = pickle.loads(pickle.dumps(policy))
    equal = copy == policy and hash(copy) == hash(policy)
    check(equal, who, "an equal copy from pickle", repr(copy))
    with _noted(f"repr {who} must spell a call that makes the policy"):
        read = eval(who, {type(p).__name__: type(p) for p in parts})
    check(read == policy, f"repr of {who}", "a spelling of the same policy", repr(read))


def _is_frozen(policy: PruningPolicy, name: str) -> bool:
    """Whether writing to a field is refused. What is written is what is there."""
    try:
        setattr(policy, name, getattr(policy, name))
    except FrozenInstanceError:
        return True
    return False


def _parts(value: object) -> Iterator[object]:
    """A setting and everything it is made of."""
    yield value
    if isinstance(value, PruningPolicy):
        value = tuple(getattr(value, f.name) for f in fields(value))
    if isinstance(value, tuple | list):
        for part in value:
            yield from _parts(part)

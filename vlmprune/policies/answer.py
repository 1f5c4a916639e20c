"""Whether what a policy's ``select`` returned is a choice: each fault named, with a hint at the slip it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import check
from vlmprune.policies.base import Ranking, Reduction, TokenContext
from vlmprune.policies.inputs import Rating


def check_selection(
    choice: object, ctx: TokenContext, who: str, like: Tensor | None = None, empties: bool = False
) -> None:
    """Raise InputError unless ``choice`` is what ``PruningPolicy.select`` may return; one host read.

    A sample with visual tokens keeps at least one, a sample without keeps none, and K is what the fullest keeps.

    Args:
        choice: what ``select(ctx)`` returned.
        ctx: the context it was asked with.
        who: what errors call the policy, for example its repr.
        like: ``[..., D]`` of the dtype and on the device that new rows must have; None = ``ctx.hidden`` if it is there.
        empties: whether a sample may keep none: what ``PruningPolicy.empties`` says of the stage.

    Raises:
        InputError: with the policy, the sample and what is wrong there.
    """
    who = f"{who}.select(ctx)"
    index = choice
    if isinstance(choice, Reduction):
        index, positions = choice.index, choice.positions
        check(positions in ("keep", "pack"), f"{who}.positions", "'keep' or 'pack'", repr(positions))
    used = check_index(index, ctx, who, not isinstance(choice, Reduction), empties)
    assert isinstance(index, Tensor)
    width = index.shape[1]
    hint = f"{width - used} more that are -1 everywhere (cut them off: index[:, :{used}])"
    check(width == used, who, f"the {used} columns that the fullest sample uses", hint)
    if isinstance(choice, Reduction) and choice.hidden is not None:
        _check_rows(choice.hidden, index, ctx.hidden if like is None else like, f"{who}.hidden")
    if isinstance(choice, Reduction) and choice.merged is not None:
        _check_merged(choice.merged, index, ctx, f"{who}.merged")


def check_scores(scores: object, ctx: TokenContext, who: str) -> Tensor:
    """``scores`` if they are ``[B, N]`` floating; no host read.

    Raises:
        InputError: naming ``who`` scored.
    """
    right = isinstance(scores, Tensor) and scores.shape == ctx.mask.shape and scores.is_floating_point()
    got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
    check(right, who, f"floating scores {tuple(ctx.mask.shape)}", got)
    assert isinstance(scores, Tensor)
    return scores


def _check_merged(merged: object, index: Tensor, ctx: TokenContext, who: str) -> None:
    """Where a Reduction says that tokens were merged."""
    shape = list(ctx.mask.shape)
    fits = isinstance(merged, Tensor) and merged.dtype == torch.int64 and list(merged.shape) == shape
    got = f"{merged.dtype} {list(merged.shape)}" if isinstance(merged, Tensor) else type(merged).__name__
    check(fits, who, f"an int64 tensor {shape}", got)
    assert isinstance(merged, Tensor)
    check(merged.device == index.device, who, f"a tensor on {index.device}", merged.device)
    for sample, (row, kept) in enumerate(zip(merged.tolist(), index.tolist(), strict=True)):
        odd = set(row) - set(kept) - {-1}
        check(not odd, f"{who}, sample {sample}", "-1, or numbers in its index", sorted(odd)[:1])


def check_ranking(ranking: object, ctx: TokenContext, who: str, empties: bool = False) -> None:
    """Raise InputError unless ``ranking`` is what ``PruningPolicy.rank`` may return; one host read where it has codes.

    Raises:
        InputError: with the policy, the sample and what is wrong there.
    """
    who = f"{who}.rank(ctx)"
    check(isinstance(ranking, Ranking), who, "a Ranking", _described(ranking))
    assert isinstance(ranking, Ranking)
    check(
        ranking.positions in ("keep", "pack"), f"{who}.positions", "'keep' or 'pack'", repr(ranking.positions)
    )
    shape, scores = [len(ctx.counts), max(ctx.counts, default=0)], ranking.scores
    if isinstance(scores, Rating):
        columns = list(scores.scoring.columns.shape)
        check(columns == shape, f"{who}.scores", f"a column for every token, {shape}", columns)
    else:
        check(
            isinstance(scores, Tensor), f"{who}.scores", f"floats {shape}, or a Rating", type(scores).__name__
        )
        assert isinstance(scores, Tensor)
        fits = scores.is_floating_point() and list(scores.shape) == shape and scores.device == ctx.device
        got = f"{scores.dtype} {list(scores.shape)} on {scores.device}"
        check(fits, f"{who}.scores", f"floats {shape} on {ctx.device}", got)
    _check_counts(ranking, ctx, who, empties)
    if ranking.code is not None:
        _check_codes(ranking, ctx, who, shape)


def _check_counts(ranking: Ranking, ctx: TokenContext, who: str, empties: bool) -> None:
    """How many stay: of every sample, or of every one of its images, and how many more its codes may add."""
    sizes: Sequence[Sequence[int]] = [(n,) for n in ctx.counts]
    keep: Any = [(k,) for k in ranking.keep] if _whole(ranking.keep) else ranking.keep
    if ranking.images is not None:
        sizes, keep = ranking.images, ranking.keep
        same = tuple(map(sum, sizes)) == ctx.counts
        check(same, f"{who}.images", f"tokens that add up to {ctx.counts}", sizes)
    fits = isinstance(keep, tuple | list) and len(keep) == len(sizes)
    fits = fits and all(_whole(own) and len(own) == len(of) for own, of in zip(keep, sizes, strict=True))
    fits = fits and all(
        0 <= k <= n for own, of in zip(keep, sizes, strict=True) for k, n in zip(own, of, strict=True)
    )
    one = "a count for each image" if ranking.images is not None else "one count a sample"
    check(fits, f"{who}.keep", f"a tuple: {one}, at most {tuple(map(tuple, sizes))}", ranking.keep)
    extra = ranking.extra
    fits = extra is None or (_whole(extra) and len(extra) == len(ctx.counts) and min(extra, default=0) >= 0)
    check(fits, f"{who}.extra", f"{len(ctx.counts)} whole numbers >= 0, one a sample, or None", extra)
    most = ranking.most(ctx.counts)
    check(
        empties or all(k or not n for k, n in zip(most, ctx.counts, strict=True)),
        f"{who}.keep",
        "at least one token",
        most,
    )


def _whole(values: object) -> bool:
    """Whether it is a tuple of whole numbers."""
    return isinstance(values, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in values)


def _check_codes(ranking: Ranking, ctx: TokenContext, who: str, shape: list[int]) -> None:
    """Codes that leave as many to choose from as shall stay, and let no more stay than was said."""
    code, name = ranking.code, f"{who}.code"
    fits = isinstance(code, Tensor) and code.dtype == torch.int8 and list(code.shape) == shape
    check(fits, name, f"int8 {shape}", _described(code))
    assert code is not None
    extra = ranking.extra or (0,) * len(ctx.counts)
    for b, (row, tokens) in enumerate(zip(code.tolist(), ctx.counts, strict=True)):
        own, more, least = row[:tokens], extra[b], ranking.least[b]
        check(set(own) <= {0, 1, 2, 3}, f"{name}, sample {b}", "0, 1, 2 or 3", sorted(set(own)))
        competing, stay = own.count(0) + own.count(3), own.count(1) + own.count(3)
        check(competing >= least, f"{name}, sample {b}", f"at least {least} that compete", competing)
        said = f"at most {more} that stay in any case, as extra says"
        check(stay <= more, f"{name}, sample {b}", said, stay)


def check_index(
    index: object, ctx: TokenContext, who: str, ascending: bool = True, empties: bool = False
) -> int:
    """Return how many columns of ``index`` the fullest sample uses; raise InputError unless it is valid up to there."""
    batch = len(ctx.counts)
    check(isinstance(index, Tensor), who, f"an int64 tensor [{batch}, K] or a Reduction", _described(index))
    assert isinstance(index, Tensor)
    check(index.dtype == torch.int64, who, "int64", _described(index))
    shape = list(index.shape)
    check(len(shape) == 2 and shape[0] == batch, who, f"[{batch}, K]", shape)
    check(index.device == ctx.mask.device, who, f"a tensor on {ctx.mask.device}", index.device)
    view = index.untyped_storage().data_ptr() == ctx.positions.untyped_storage().data_ptr()
    check(not view or index.numel() == 0, who, "numbers among the entering tokens", "ctx.positions")
    rows = index.tolist()
    for sample, row in enumerate(rows):
        _check_row(row, ctx, sample, f"{who}, sample {sample}", ascending, empties)
    return max((sum(i != -1 for i in row) for row in rows), default=0)


def _check_row(
    row: list[int], ctx: TokenContext, sample: int, who: str, ascending: bool, empties: bool
) -> None:
    """One sample's numbers."""
    tokens, kept = ctx.counts[sample], [i for i in row if i != -1]
    hole = row.index(-1) if -1 in row else len(row)
    check(hole == len(kept), who, "-1 only on the right", f"-1 before {kept[hole:][:1]}")
    outside = [i for i in kept if not 0 <= i < tokens]
    right = f"numbers 0 to {tokens - 1} of its tokens" if tokens else "nothing, as it has no visual tokens"
    check(not outside, who, right, f"{outside[:1]}{_hint(kept, ctx, sample) if outside else ''}")
    twice = [i for i, after in pairwise(sorted(kept)) if i == after]
    check(not twice, who, "each number once", f"{twice[:1]} again")
    falls = [pair for pair in pairwise(kept) if ascending and pair[0] > pair[1]]
    check(not falls, who, "ascending numbers (a Reduction may reorder)", falls[:1])
    check(empties or bool(kept) or tokens == 0, who, f"at least one of its {tokens} tokens", "none")


def _hint(kept: list[int], ctx: TokenContext, sample: int) -> str:
    """Which other numbering of the tokens these numbers are, if they are one."""
    for name in ("positions", "ordinals"):
        if set(kept) <= set(getattr(ctx, name)[sample].tolist()):
            return f": these are ctx.{name}, not numbers among the entering tokens"
    return ""


def _described(choice: object) -> str:
    """What came in place of an index, and the slip it looks like."""
    if choice is None:
        return "None (is a return missing?)"
    if isinstance(choice, tuple | list) and choice and isinstance(choice[0], Tensor):
        return f"a {type(choice).__name__} of {len(choice)} (select_topk returns two: did you forget [0]?)"
    if not isinstance(choice, Tensor):
        return type(choice).__name__
    if choice.dtype == torch.bool:
        return "a bool mask (give the numbers of the tokens that stay)"
    return f"{choice.dtype} (scores?)" if choice.is_floating_point() else f"{choice.dtype}"


def _check_rows(rows: object, index: Tensor, like: Tensor | None, who: str) -> None:
    """The new contents of a Reduction's rows."""
    wanted = f"{list(index.shape)} + [D]" if like is None else f"{[*index.shape, like.shape[-1]]}"
    check(isinstance(rows, Tensor), who, f"a tensor {wanted}", type(rows).__name__)
    assert isinstance(rows, Tensor)
    fits = rows.ndim == 3 and rows.shape[:2] == index.shape
    fits = fits and (like is None or rows.shape[2] == like.shape[-1])
    check(fits, who, wanted, list(rows.shape))
    dtype, device = (rows.dtype, index.device) if like is None else (like.dtype, like.device)
    check(rows.is_floating_point() and rows.dtype == dtype, who, str(dtype), rows.dtype)
    check(rows.device == device, who, f"a tensor on {device}", rows.device)

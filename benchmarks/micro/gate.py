"""The gate: a provider whose result is wrong is refused before anything is timed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from .inputs import Inputs

# largest |out - true| / |true| (2-norms), true from operands widened to float32
ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
SAME_CHOICE = 0.8  # of greedily chosen tokens: one near tie decided otherwise changes later choices too


# what a provider may die of: a compiler, a launch, a package that is not as expected; the others are still measured
FAILURES: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
FAILURES += (ImportError, AssertionError)
if find_spec("triton") is not None:
    from triton.errors import TritonError

    FAILURES += (TritonError,)


class WrongResultError(AssertionError):
    """A provider computed something else."""


def failed(error: Exception) -> str:
    """One line about a failure."""
    kind = "wrong result" if isinstance(error, WrongResultError) else f"failed: {type(error).__name__}"
    return f"{kind}: {' '.join(str(error).split())[:300]}"


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise WrongResultError(what)


def close(got: Tensor, true: Tensor, dtype: torch.dtype) -> None:
    """Near the truth for operands of ``dtype``; NaN never passes."""
    _require(got.shape == true.shape, f"shape: expected {tuple(true.shape)}, got {tuple(got.shape)}")
    error = ((got.float() - true.float()).norm() / true.float().norm()).item()
    _require(error <= ERROR[dtype], f"error: expected at most {ERROR[dtype]:.0e}, got {error:.2g}")


def equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """The same bits."""
    pairs = zip(got, want, strict=True)
    _require(all(torch.equal(a, b) for a, b in pairs), "copy: expected equal tensors, got others")


def best_kept(index: Tensor, scores: Tensor, keep: int, slack: float = 0.0) -> None:
    """``keep`` distinct ordinals, ascending, none of which scores less than the keep-th best (ties may go either way)."""
    _require(tuple(index.shape) == (1, keep), f"index: expected [1, {keep}], got {tuple(index.shape)}")
    _require(bool((index.diff(dim=1) > 0).all()), "index: expected ascending positions, got others")
    worst, least = scores.gather(1, index).amin(), scores.topk(keep, dim=1).values.amin()
    ok = bool(worst >= least - slack * least.abs())
    _require(ok, f"kept scores: expected at least {least:.4g}, got {worst:.4g}")


def pruned(x: Inputs, got: tuple[Tensor, list[Tensor]], scores: Tensor | None = None) -> None:
    """All text and the best visual tokens, by the true scores or these, in order, and exactly their rows of every tensor."""
    index, tensors = got
    _require(tuple(index.shape) == (1, x.shape.kept), f"index: expected {x.shape.kept} positions")
    first, last = x.shape.before, x.shape.before + x.shape.visual
    visual = index[(index >= first) & (index < last)][None]
    _require(
        visual.shape[1] == x.shape.keep, f"visual tokens: expected {x.shape.keep}, got {visual.shape[1]}"
    )
    slack = 2 * ERROR[x.dtype] if scores is None else 0.0
    best_kept(visual - first, x.true_scores if scores is None else scores, x.shape.keep, slack)
    equal(tensors, [t.index_select(t.ndim - 2, index[0]) for t in x.tensors])


def mostly(got: Tensor, want: Tensor) -> None:
    """The same set of positions, up to decisions that nearly tie."""
    _require(got.shape == want.shape, f"shape: expected {tuple(want.shape)}, got {tuple(got.shape)}")
    share = torch.isin(got, want).float().mean().item()
    _require(share >= SAME_CHOICE, f"choice: expected at least {SAME_CHOICE:.0%} in common, got {share:.0%}")


def same_partition(got: Tensor, want: Tensor) -> None:
    """The same clusters whatever their numbers, up to tokens that nearly tie: counts pairs of tokens."""
    together, expected = (t[:, :, None] == t[:, None, :] for t in (got, want))
    share = ((together & expected).sum() / (together | expected).sum()).item()
    _require(share >= SAME_CHOICE, f"pairs: expected at least {SAME_CHOICE:.0%} in common, got {share:.0%}")

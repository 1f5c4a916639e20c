"""Op: choose tokens one after another, each the best given those already chosen: diverse, covering or suppressed sets."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.errors import check, require
from vlmprune.ops import reference_sets
from vlmprune.ops._checks import FLOATS, check_choice, check_count, check_features, check_tensor
from vlmprune.ops._operator import operator

RULES = tuple(reference_sets.RULES)
NEED_RELEVANCE = ("dpp", "nms")


def greedy_select(
    features: Tensor,
    keep: int,
    rule: str = "maxmin",
    *,
    relevance: Tensor | None = None,
    threshold: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``keep`` tokens of each sample greedily, by the cosines between them. Never waits for the device.

    Rules (a chosen token is never chosen again; ties go to the lower position; all in float32):
        "maxmin": the token whose nearest chosen token is farthest, distance 1 - cos; the first choice is the token whose
            nearest other token is farthest (DivPrune).
        "dpp": greedy MAP for a determinantal point process with the kernel relevance_i cos_ij relevance_j (CDPruner; Chen et
            al. 2018). Tokens that the chosen ones span to within rounding tie at zero: they come last, lower position first.
        "coverage": the largest relevance_j * sum_i max(0, cos_ij - c_i), where c_i is token i's largest cosine to a chosen
            token, at least 0 (SCOPE). ``relevance=None`` = ones.
        "nms": in order of relevance, skipping tokens whose cosine to a chosen one exceeds ``threshold``; if too few pass,
            the most relevant skipped ones fill up (GreedyPrune).

    The kernel stores the cosines of all pairs, ``B * N * N`` float32; "dpp" also ``B * keep * N``.

    Args:
        features: ``[B, N, D]`` float32, float16 or bfloat16, last dim contiguous. A token whose norm is NaN or outside
            1e-15..1e15 (zero, infinite) has cosine 0 to every token, itself included.
        keep: how many tokens survive, at most N; a sample with fewer real tokens keeps them all.
        rule: "maxmin", "dpp", "coverage" or "nms".
        relevance: ``[B, N]`` float32, float16 or bfloat16, normalised by the caller; "dpp" and "nms" need it, "maxmin" takes
            none. For "dpp" and "coverage" NaN and infinities count as 0, for "coverage" negatives too; "nms" ranks
            infinities as they are and NaN as -inf. The product of any two must fit float32.
        threshold: largest cosine that "nms" lets pass; None with the other rules.
        mask: ``[B, N]`` bool, False = padding: never chosen, and no neighbour of anything. None = no padding.

    Returns:
        ``index [B, keep]`` int64, the chosen positions ascending, and ``order [B, keep]`` int64, the same in the order they
        were chosen; both have -1 on the right.

    Raises:
        InputError: an argument has another rank, shape, dtype, stride, device or value, or does not go with the rule.
        BackendError: no backend can run on the device of ``features``.

    Example:
        >>> tokens = torch.eye(3)[[0, 0, 1, 2]][None]  # the first two are one
        >>> index, order = ops.greedy_select(tokens, keep=3)
        >>> index, order
        (tensor([[0, 2, 3]]), tensor([[2, 0, 3]]))
    """
    check_features(features)
    B, N, _ = features.shape
    check_count("keep", keep, N)
    check_choice("rule", rule, RULES)
    _check_rule_inputs(features, rule, relevance, threshold)
    check_tensor("mask", mask, [torch.bool], (B, N), features)
    return _greedy_select(features, keep, rule, relevance, 0.0 if threshold is None else threshold, mask)


def _check_rule_inputs(
    features: Tensor, rule: str, relevance: Tensor | None, threshold: float | None
) -> None:
    """The rule gets the inputs it reads, and no others."""
    B, N, _ = features.shape
    if rule in NEED_RELEVANCE:
        require(relevance, "relevance", f"[{B}, {N}] with rule {rule!r}")
    if relevance is not None:
        check(rule != "maxmin", "relevance", "None with rule 'maxmin'", "a tensor")
        check_tensor("relevance", relevance, FLOATS, (B, N), features)
    if rule == "nms":
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        check(number and threshold == threshold, "threshold", "a number with rule 'nms'", repr(threshold))
    else:
        check(threshold is None, "threshold", f"None with rule {rule!r}", repr(threshold))


@operator(reference_sets.greedy_select)
def _greedy_select(
    features: Tensor, keep: int, rule: str, relevance: Tensor | None, threshold: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape, int64 = (features.shape[0], keep), torch.int64
    return features.new_empty(shape, dtype=int64), features.new_empty(shape, dtype=int64)

"""VisionZip's budget of two parts: dominant tokens, kept as they are, and contextual ones, into which the rest is merged."""

from __future__ import annotations

from typing import NamedTuple, Self

from vlmprune.errors import check
from vlmprune.policies.checks import check_flag, check_keep, check_share, check_whole
from vlmprune.policies.counts import keep_count

PUBLISHED = {192: (162, 30), 128: (108, 20), 64: (54, 10), 32: (27, 5)}
"""Budgets as (dominant, contextual); 32 is the one per crop of LLaVA-NeXT at 160 tokens."""
USUAL = 64
"""Which of them it is where nothing is said."""


class TwoBudgets(NamedTuple):
    """How many tokens of every image.

    Attributes:
        dominant, contextual: two numbers (int), or two shares (float).
        count_cls: whether CLS is one of a number of dominant tokens, so that an image keeps one fewer.
    """

    dominant: int | float
    contextual: int | float
    count_cls: bool = False

    @classmethod
    def of(
        cls, dominant: float | None, contextual: float | None, tokens: int | None, count_cls: bool
    ) -> Self:
        """From settings; what is None is filled in from the published budget of so many ``tokens``, or from the usual one.

        Raises:
            InputError: no such budget, or one that contradicts the settings; or these are out of range.
        """
        known = tokens is None or (type(tokens) is int and tokens in PUBLISHED)
        check(known, "tokens", f"one of {', '.join(map(str, PUBLISHED))}", repr(tokens))
        settings: dict[str, int | float] = {}
        names, values = ("dominant", "contextual"), PUBLISHED[tokens or USUAL]
        for name, given, value in zip(names, (dominant, contextual), values, strict=True):
            agrees = tokens is None or given in (None, value)
            check(agrees, name, f"{value} with tokens={tokens}", repr(given))
            settings[name] = value if given is None else given
        check_flag("count_cls", count_cls)
        made = cls(**settings, count_cls=count_cls)
        made._check()
        return made

    def _check(self) -> None:
        if not isinstance(self.dominant, float):
            check_whole("dominant", self.dominant, 1 + self.count_cls)
            check_whole("contextual", self.contextual, 0)
            return
        check_keep(self.dominant, "dominant")
        check_share("contextual", self.contextual)
        check(self.both <= 1 + 1e-9, "contextual", "shares that add up to 1.0 at most", self.both)
        check(not self.count_cls, "count_cls", "False with shares", True)

    @property
    def both(self) -> float:
        """The two together."""
        return self.dominant + self.contextual

    def shares(self, of: float) -> tuple[float, float]:
        """A share of the tokens, in the proportion of the two."""
        merged = of * self.contextual / self.both
        return of - merged, merged

    def counts(self, tokens: int) -> tuple[int, int]:
        """How many of an image's tokens are dominant, and into how many the others are merged.

        Example:
            >>> TwoBudgets(54, 10).counts(576), TwoBudgets(0.2, 0.1).counts(30), TwoBudgets(54, 10).counts(60)
            ((54, 10), (6, 3), (54, 6))
        """
        if isinstance(self.dominant, float):
            both = keep_count(self.both, tokens)
            merged = min(int(self.contextual * tokens + 1e-6), both - 1)
            return both - merged, merged
        first = min(tokens, self.dominant - self.count_cls)
        return first, min(int(self.contextual), tokens - first)

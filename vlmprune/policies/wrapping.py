"""A policy inside another one, and the budget that it is given there."""

from __future__ import annotations

from dataclasses import replace

from vlmprune.errors import check
from vlmprune.policies.base import Growth, Needs, PruningPolicy
from vlmprune.policies.checks import check_keep


class Wrapping(PruningPolicy):
    """Acts where the policy ``inside`` acts and keeps as many as that does; what it does otherwise it says itself."""

    @property
    def inside(self) -> PruningPolicy:
        """The other policy."""
        raise NotImplementedError(f"{type(self).__name__}: expected an `inside` of its own, got none")

    @property
    def layers(self) -> tuple[int, ...]:
        return self.inside.layers

    @property
    def growth(self) -> Growth | None:
        return self.inside.growth

    @property
    def packs(self) -> bool:
        return self.inside.packs

    @property
    def fixed_count(self) -> bool:
        return self.inside.fixed_count

    def needs(self, layer: int) -> Needs:
        return self.inside.needs(layer)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return self.inside.kept(tokens, images, layer)

    def spends(self, layer: int) -> str:
        return self.inside.spends(layer)

    def forget(self) -> None:
        self.inside.forget()


def with_keep(selection: PruningPolicy, keep: int | float | None) -> PruningPolicy:
    """The selection with ``keep`` in the place of its own budget, if it is given.

    Raises:
        InputError: no share or number per image; or a number, where the budget is none that is called ``keep``.
    """
    if keep is None:
        return selection
    check_keep(keep)
    if "keep" in selection.__dataclass_fields__:
        return replace(selection, keep=keep)  # type: ignore[call-arg]
    named = f"a share, or None, with a selection whose budget has other names, {selection!r}"
    check(isinstance(keep, float), "keep", named, keep)
    return selection.at(float(keep))

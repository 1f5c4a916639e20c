"""What a policy reads of the model, declared before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from vlmprune.errors import check


@dataclass(frozen=True)
class Needs:
    """What a policy reads besides the layout of the tokens; the wiring computes nothing else.

    Args:
        hidden: the visual tokens' hidden states entering the stage.
        attention: query and key of the layer before the stage ("previous"), of the stage's own layer, projected from
            what enters it ("own"), or None.
        rows: which query rows: the last prompt row ("last"), the text after the last image ("text", one host read a
            prefill), or every prompt row ("all").
        embeds: the input embeddings of the whole prompt, and where its text is (one host read a prefill).
        vision: vision-tower layers whose query and key to read (-2 = the last but one); with any, also the features.
    """

    hidden: bool = False
    attention: Literal["previous", "own"] | None = None
    rows: Literal["last", "text", "all"] = "last"
    embeds: bool = False
    vision: tuple[int, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        """The needs of two policies that act at one layer. Raises ValueError where they cannot both be met."""
        return Needs(
            hidden=self.hidden or other.hidden,
            attention=_either("attention", self.attention, other.attention, None),
            rows=_either("rows", self.rows, other.rows, "last"),
            embeds=self.embeds or other.embeds,
            vision=tuple(sorted({*self.vision, *other.vision})),
        )


T = TypeVar("T")


def _either(name: str, one: T, other: T, weakest: T) -> T:
    """The stronger of two needs; two different ones above the weakest exclude each other."""
    clash = one != other and weakest not in (one, other)
    check(not clash, name, "policies at one layer that read the same", f"{one!r} and {other!r}")
    return other if one == weakest else one

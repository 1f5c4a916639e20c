"""A compensator of texts that are known before: what a reader of signs found, a scene graph, a human's note."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmprune.compensation.interface import Caption, Discarded
from vlmprune.compensation.remembering import key_of
from vlmprune.errors import check


@dataclass(frozen=True)
class Known:
    """One text for each image of the prompt (of a batch: of all its prompts, one after the other), in order.

    Where ``generate`` runs copies of a prompt (beams, several answers), the copies have the texts of their images: more
    images than texts are counted without those that are the same as an earlier one, in tokens and question.

    Args:
        texts: the texts; "" = nothing joins the prompt for that image.

    Raises:
        InputError: ``texts`` is a single string or holds something else than strings; or, when called, there is
            another number of images than of texts.
    """

    texts: Sequence[str]

    def __post_init__(self) -> None:
        """Keep the texts as a tuple: a list changed later is not what was given."""
        check(
            not isinstance(self.texts, str), "texts", "one text for each image, [text, ...]", repr(self.texts)
        )
        for text in self.texts:
            check(isinstance(text, str), "texts", "strings", repr(text))
        object.__setattr__(self, "texts", tuple(self.texts))

    def __call__(self, images: Sequence[Discarded], candidates: int = 1) -> list[Caption]:
        """The texts as they are; what is dropped and ``candidates`` are not looked at."""
        places = [*range(len(images))]
        if len(images) > len(self.texts):
            first: dict[bytes, int] = {}
            places = [first.setdefault(key_of(image, candidates), len(first)) for image in images]
        expected = f"one text for each image of the prompts, {len(images)}"
        check(len({*places}) == len(self.texts), "Known.texts", expected, len(self.texts))
        return [Caption(self.texts[place]) for place in places]

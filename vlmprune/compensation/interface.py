"""What a compensator is: it is shown what pruning drops of an image, and says in words what the question needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Discarded:
    """One image (or video) of a prompt, some of whose tokens are about to be dropped.

    Attributes:
        features: ``[N, D]`` all its visual tokens as the projector gives them to the language model.
        dropped: ``[R]`` int64, the places in ``features`` that are dropped, ascending; R may be 0.
        question: what is asked about it, without template and special tokens; never empty.
    """

    features: Tensor
    dropped: Tensor
    question: str


@dataclass(frozen=True)
class Caption:
    """What a compensator says of one image.

    Attributes:
        text: the words that join the prompt; "" = nothing does.
        candidates: all the texts it was chosen from, if there were several.
        flops: what writing and choosing them cost (2 x MACs); 0 = not counted.
    """

    text: str
    candidates: tuple[str, ...] = ()
    flops: int = 0


class Compensator(Protocol):
    """Anything that can be called like this: a captioner, a reader of signs, a scene graph, a lookup of known texts."""

    def __call__(self, images: Sequence[Discarded], candidates: int) -> Sequence[Caption | str]:
        """One caption for each of these images, of any number of prompts together.

        Args:
            images: at least one; those of one prompt stand together, in its order.
            candidates: how many texts to write and choose from; one that writes a single text need not look at it.
        """
        ...

"""Calls a compensator and makes sure of what it answers."""

from __future__ import annotations

from collections.abc import Sequence

from vlmprune.compensation.interface import Caption, Compensator, Discarded
from vlmprune.errors import check


def captions_of(compensator: Compensator, images: Sequence[Discarded], candidates: int) -> list[Caption]:
    """One ``Caption`` for each of ``images``, a bare string made one.

    Raises:
        InputError: the compensator answers with another number of captions than there are images, or with something
            that is neither a string nor a ``Caption``; named by its class, or by its name if it is a function.
    """
    name = getattr(compensator, "__name__", type(compensator).__name__)
    answer = compensator(images, candidates)
    listed = isinstance(answer, Sequence) and not isinstance(answer, str)
    check(listed, f"what {name} returns", f"a list of {len(images)} captions", type(answer).__name__)
    check(
        len(answer) == len(images),
        f"what {name} returns",
        f"{len(images)} captions, one an image",
        len(answer),
    )
    captions = [Caption(caption) if isinstance(caption, str) else caption for caption in answer]
    for caption in captions:
        known = isinstance(caption, Caption)
        check(known, f"what {name} returns", "str or Caption for each image", type(caption).__name__)
        check(isinstance(caption.text, str), f"what {name} returns", "captions of text", repr(caption.text))
    return captions

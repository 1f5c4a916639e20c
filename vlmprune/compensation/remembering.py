"""A compensator that asks another one only about what it has not seen yet."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmprune.compensation.captions import captions_of
from vlmprune.compensation.interface import Caption, Compensator, Discarded
from vlmprune.errors import check


class Remembering:
    """Remembers the captions of the last images, so that the same image and question cost nothing again.

    The same means: features equal to the bit, of the same type and shape, the same places dropped, the same question, the
    same number of candidates. Reading the features copies them to the host, which waits for a GPU. A compensator whose
    weights change answers anew after ``clear``. Several threads may call it; two that ask the same at once may both have
    it written. A copied or unpickled one starts empty.

    Args:
        compensator: what is asked about unseen images: all of a call together, equal ones once.
        entries: how many captions are kept; the one not asked for longest goes first.

    Attributes:
        hits: images answered from memory, or from the same one earlier in the call.
    """

    def __init__(self, compensator: Compensator, entries: int = 256) -> None:
        check(
            callable(compensator),
            "compensator",
            "a callable (images, candidates) -> captions",
            repr(compensator),
        )
        whole = isinstance(entries, int) and not isinstance(entries, bool) and entries > 0
        check(whole, "entries", "a positive int", repr(entries))
        self.compensator = compensator
        self.entries = entries
        self.hits = 0
        self._captions: OrderedDict[bytes, Caption] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        """Copies start empty: a lock cannot be copied, and what is remembered belongs to one process."""
        return Remembering, (self.compensator, self.entries)

    def __call__(self, images: Sequence[Discarded], candidates: int) -> list[Caption]:
        """One caption an image; one that was known has the same text and ``flops`` 0.

        Raises:
            InputError: the compensator returns another number of captions than it was shown images, or no captions.
        """
        keys = [key_of(image, candidates) for image in images]
        with self._lock:
            captions = {key: self._captions[key] for key in keys if key in self._captions}
        unseen = {key: image for key, image in zip(keys, images, strict=True) if key not in captions}
        written = captions_of(self.compensator, list(unseen.values()), candidates) if unseen else []
        fresh = dict(zip(unseen, written, strict=True))
        captions |= {key: replace(caption, flops=0) for key, caption in fresh.items()}
        with self._lock:
            self.hits += len(keys) - len(fresh)
            self._keep(captions)
        return [fresh.pop(key, captions[key]) for key in keys]

    def clear(self) -> None:
        """Forget every caption."""
        with self._lock:
            self._captions.clear()

    def _keep(self, captions: dict[bytes, Caption]) -> None:
        for key, caption in captions.items():
            self._captions[key] = caption
            self._captions.move_to_end(key)
        while len(self._captions) > self.entries:
            self._captions.popitem(last=False)


def key_of(image: Discarded, candidates: int) -> bytes:
    """What is the same for the same image, question and number of candidates."""
    digest = hashlib.sha256(repr((image.question, candidates)).encode())
    for tensor in (image.features, image.dropped):
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(_bytes(tensor))
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()

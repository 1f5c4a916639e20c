"""A trained scorer as a policy holds it: read from its folder once, and on every device where it is asked."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch

from vlmprune.compensation.saving import standing
from vlmprune.errors import check
from vlmprune.policies.scorer import Scorer


def check_scorer(given: object) -> None:
    """``given`` is a ``Scorer``, or a folder."""
    known = isinstance(given, Scorer) or (isinstance(given, str) and standing(given).is_dir())
    check(known, "scorer", "a Scorer, or the folder of a saved one", repr(given))


class Held:
    """A scorer, or the folder of one, which is read when first asked for; copied to where it is asked for and is not."""

    def __init__(self, given: Scorer | str) -> None:
        self._given, self._lock = given, threading.Lock()
        self._scorer = given if isinstance(given, Scorer) else None
        self._copies: dict[torch.device, Scorer] = {}

    def __reduce__(self) -> Any:
        return Held, (self._given,)

    @property
    def scorer(self) -> Scorer:
        """As it was given, or on the CPU."""
        with self._lock, torch.inference_mode(False):  # else nobody could ever train it on
            if self._scorer is None:
                self._scorer = Scorer.from_pretrained(str(self._given))
            return self._scorer

    def on(self, device: torch.device) -> Scorer:
        """The one for rows there. Raises InputError if it is in training mode."""
        scorer = self.scorer
        check(not scorer.training, "scorer", "a module in evaluation mode (.eval())", "one in training mode")
        weight = next(scorer.parameters(), None)
        if weight is None or weight.device == device:
            return scorer
        with self._lock, torch.inference_mode(False):
            if device not in self._copies:
                self._copies[device] = copy.deepcopy(scorer).to(device)
            return self._copies[device]

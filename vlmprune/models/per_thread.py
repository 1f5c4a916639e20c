"""What one thread has under way: several may run one attached model at once."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any


class PerThread(threading.local):
    """Attributes of which every thread has its own; a copied or saved model starts without any.

    Args:
        **start: names and values with which each thread begins.
    """

    def __init__(self, **start: Any) -> None:
        self.__dict__.update(start)
        self._start = start

    def __reduce__(self) -> Any:
        return partial(PerThread, **self._start), ()

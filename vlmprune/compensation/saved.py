"""A compensator as it is given to a policy: one that lies in a folder is loaded when it is first asked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from vlmprune.compensation.interface import Caption, Compensator, Discarded
from vlmprune.compensation.known import Known
from vlmprune.compensation.remembering import Remembering
from vlmprune.compensation.saving import standing
from vlmprune.errors import check


def written_at(folder: str) -> str:
    """When the weights in a compensator's folder were written, to the second; "" if there are none."""
    times = [path.stat().st_mtime for path in standing(folder).rglob("*.safetensors")]
    return datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if times else ""


class Saved:
    """What ``Describer.save_pretrained`` wrote, put where the first image's features are.

    Args:
        folder: with the compensator in it. Copies of this share nothing, each loads its own.

    Raises:
        InputError: no such folder, or, when called, no compensator in it.
    """

    def __init__(self, folder: str) -> None:
        check(
            standing(folder).is_dir(),
            "compensator",
            "a compensator, or the folder of a saved one",
            repr(folder),
        )
        self.folder = folder
        self._loaded: Compensator | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Saved, (self.folder,)

    def __call__(self, images: Sequence[Discarded], candidates: int) -> Sequence[Caption | str]:
        """What the loaded compensator says."""
        with self._lock:
            if self._loaded is None:
                from vlmprune.compensation.describer import load_compensator

                self._loaded = load_compensator(self.folder).to(images[0].features.device)
        return self._loaded(images, candidates)


def opened(given: Compensator | str) -> Compensator:
    """A compensator, or the one saved in a folder, behind a memory of what it has said.

    Known texts go by the order of the images, and have none.

    Raises:
        InputError: no such folder, or something that cannot be called.
    """
    found = Saved(given) if isinstance(given, str) else given
    check(callable(found), "compensator", "a compensator, or the folder of a saved one", repr(found))
    return found if isinstance(found, Known | Remembering) else Remembering(found)

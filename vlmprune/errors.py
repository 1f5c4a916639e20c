"""The exceptions vlmprune raises, and the two helpers that raise most of them."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class BackendError(RuntimeError):
    """No backend can run an op on the given inputs. The message lists every reason."""


class VersionError(ImportError):
    """An installed version of torch, triton or transformers is outside the supported range."""


class ModelError(RuntimeError):
    """A model cannot be pruned: no visual tokens, an unsupported decoder, cache or layer."""


class NotPrunedError(RuntimeError):
    """Decoder layers ran inside a pruning scope but the hooks did not: the result was not pruned."""


def check(ok: bool, arg: str, expected: str, got: object) -> None:
    """Raise ValueError naming the argument, what was expected and what arrived."""
    if not ok:
        raise ValueError(f"{arg}: expected {expected}, got {got}")


def require(value: T | None, arg: str, expected: str) -> T:
    """Return ``value``, or raise ValueError if it is None."""
    if value is None:
        raise ValueError(f"{arg}: expected {expected}, got None")
    return value

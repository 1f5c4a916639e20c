"""The exceptions vlmprune raises, the two helpers that raise most of them, and what to say of others'."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """An argument is not what was expected. A ValueError that is not one of these is a fault of the code."""


class BackendError(RuntimeError):
    """No backend can run an op on the given inputs. The message lists every reason."""


class VersionError(ImportError):
    """An installed version of torch, triton or transformers is outside the supported range."""


class ModelError(RuntimeError):
    """A model cannot be pruned: no visual tokens, an unsupported decoder, cache or layer."""


class NotPrunedError(RuntimeError):
    """Decoder layers ran inside a pruning scope but the hooks did not: the result was not pruned."""


def check(ok: bool, arg: str, expected: str, got: object) -> None:
    """Raise InputError naming the argument, what was expected and what arrived."""
    if not ok:
        raise InputError(f"{arg}: expected {expected}, got {got}")


def require(value: T | None, arg: str, expected: str) -> T:
    """Return ``value``, or raise InputError if it is None."""
    if value is None:
        raise InputError(f"{arg}: expected {expected}, got None")
    return value


def first_line(error: BaseException) -> str:
    """What an error of another library says first (advice stands below that), or its name if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

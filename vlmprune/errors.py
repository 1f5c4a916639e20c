"""The exceptions vlmprune raises, the helpers that raise most of them, and what to say of others'."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
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


def check_known(name: object, known: Collection[str], arg: str, expected: str = "one of") -> None:
    """Raise InputError unless ``name`` is one of ``known``; names all of them, and the one that is most like it.

    >>> check_known("fether", ["fastv", "feather"], "policy")
    Traceback (most recent call last):
        ...
    vlmprune.errors.InputError: policy: expected one of fastv, feather, got 'fether' (did you mean 'feather'?)
    """
    if name not in known:
        raise InputError(f"{arg}: expected {expected} {', '.join(known)}, got {name!r}{nearest(name, known)}")


def nearest(name: object, known: Iterable[str]) -> str:
    """What an error says behind a name that is not known: the known one most like it, or "" if none is like it.

    >>> nearest("FastV", ["fastv", "feather"])
    " (did you mean 'fastv'?)"
    """
    spelled = {some.lower(): some for some in known}
    close = get_close_matches(str(name).lower(), spelled, n=1)
    return f" (did you mean {spelled[close[0]]!r}?)" if close else ""


def require(value: T | None, arg: str, expected: str) -> T:
    """Return ``value``, or raise InputError if it is None."""
    if value is None:
        raise InputError(f"{arg}: expected {expected}, got None")
    return value


def first_line(error: BaseException) -> str:
    """What an error of another library says first (advice stands below that), or its name if it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

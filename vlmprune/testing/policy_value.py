"""Whether a policy's settings are a value: frozen, equal to a copy, hashable, picklable, and spelled by ``repr``."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace

from vlmprune.errors import check
from vlmprune.policies.base import PruningPolicy
from vlmprune.testing.policy_trial import Noted


def check_layers(policy: PruningPolicy) -> tuple[int, ...]:
    """The policy's layers. Raises InputError unless they are whole numbers from 0, ascending, one or more."""
    layers = policy.layers
    ok = isinstance(layers, tuple) and len(layers) > 0 and all(type(layer) is int for layer in layers)
    ok = ok and list(layers) == sorted(set(layers)) and layers[0] >= 0
    check(ok, f"{policy!r}.layers", "a tuple of one or more layers, ascending, each once", repr(layers))
    return layers


def check_value(policy: PruningPolicy) -> None:
    """Raise InputError unless the policy is a value; one that holds a function need not pickle or be read back."""
    names = [f.name for f in fields(policy)]
    more = sorted(vars(policy).keys() - set(names))
    check(not more, f"{policy!r}", "attributes that are fields of a dataclass", more)
    check(
        _is_frozen(policy, names[0]),
        f"{policy!r}",
        "a class under @dataclass(frozen=True)",
        "one that can change",
    )
    with Noted(f"hash({policy!r}): settings must be hashable, for example tuples in place of lists"):
        hash(policy)
    with Noted(
        f"dataclasses.replace({policy!r}) must make the same policy: a field is an argument of that name"
    ):
        same = replace(policy)
    check(same == policy, f"{policy!r}", "an equal copy from dataclasses.replace", repr(same))
    parts = list(_parts(policy))
    if any(callable(part) for part in parts):
        return
    with Noted(f"{policy!r} must survive pickle: its class stands at the top of a module"):
        copy = pickle.loads(pickle.dumps(policy))
    check(
        copy == policy and hash(copy) == hash(policy), f"{policy!r}", "an equal copy from pickle", repr(copy)
    )
    with Noted(f"repr {policy!r} must spell a call that makes the policy"):
        read = eval(repr(policy), {type(p).__name__: type(p) for p in parts})
    check(read == policy, f"repr of {policy!r}", "a spelling of the same policy", repr(read))


def _is_frozen(policy: PruningPolicy, name: str) -> bool:
    """Whether writing to a field is refused. What is written is what is there."""
    try:
        setattr(policy, name, getattr(policy, name))
    except FrozenInstanceError:
        return True
    return False


def _parts(value: object) -> Iterator[object]:
    """A setting and everything it is made of."""
    yield value
    inner: list[object] = []
    if isinstance(value, PruningPolicy):
        inner = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, tuple | list):
        inner = list(value)
    for part in inner:
        yield from _parts(part)

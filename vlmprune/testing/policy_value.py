"""Whether a policy's settings are a value: frozen, equal to a copy, hashable, picklable, and spelled by ``repr``."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields, replace

from vlmprune.errors import check
from vlmprune.policies.base import PruningPolicy


@contextmanager
def noted(note: str) -> Iterator[None]:
    """Adds a note to whatever is raised in its block."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


def check_layers(policy: PruningPolicy) -> tuple[int, ...]:
    """The policy's layers. Raises InputError unless they are whole numbers from 0, ascending, one or more."""
    layers = policy.layers
    ok = isinstance(layers, tuple) and len(layers) > 0 and all(type(layer) is int for layer in layers)
    ok = ok and list(layers) == sorted(set(layers)) and layers[0] >= 0
    check(ok, f"{policy!r}.layers", "a tuple of one or more layers, ascending, each once", repr(layers))
    return layers


def check_value(policy: PruningPolicy) -> None:
    """Raise InputError unless the policy is a value; one that holds a function need not pickle or be read back."""
    who, names = f"{policy!r}", [f.name for f in fields(policy)]
    more = sorted(vars(policy).keys() - set(names))
    check(not more, who, "attributes that are fields of a dataclass", more)
    frozen = _is_frozen(policy, names[0])
    check(frozen, who, "a class under @dataclass(frozen=True)", "one that can change")
    with noted(f"hash({who}): settings must be hashable, for example tuples in place of lists"):
        hash(policy)
    with noted(f"dataclasses.replace({who}) must make the same policy: a field is an argument of that name"):
        same = replace(policy)
    check(same == policy, who, "an equal copy from dataclasses.replace", repr(same))
    parts = list(_parts(policy))
    if any(callable(part) for part in parts):
        return
    with noted(f"{who} must survive pickle: its class stands at the top of a module"):
        copy = pickle.loads(pickle.dumps(policy))
    equal = copy == policy and hash(copy) == hash(policy)
    check(equal, who, "an equal copy from pickle", repr(copy))
    with noted(f"repr {who} must spell a call that makes the policy"):
        read = eval(who, {type(p).__name__: type(p) for p in parts})
    check(read == policy, f"repr of {who}", "a spelling of the same policy", repr(read))


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
    if isinstance(value, PruningPolicy):
        value = tuple(getattr(value, f.name) for f in fields(value))
    if isinstance(value, tuple | list):
        for part in value:
            yield from _parts(part)

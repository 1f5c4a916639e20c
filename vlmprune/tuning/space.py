"""What a search tries: policies as typed, with braces for alternatives, and schedules over layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations, product

from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError, check
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import check_listed, policy_from
from vlmprune.tuning.schedules import Schedule, read_schedule

Candidate = PruningPolicy | Schedule
"""What is fitted to a budget: a policy by ``at``, a schedule by what it is made of."""
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d*)(?:\.\.(\d+))?")
SIXTEENTHS = (1, 2, 4, 6, 8)


def default_policies(depth: int) -> tuple[str, ...]:
    """What is tried where nothing is said: evenly spaced and diverse tokens, attention at some layers, one after the other.

    >>> default_policies(32)[2]
    'fastv:layer={2,4,8,12,16}'
    """
    layers = [*dict.fromkeys(max(1, depth * n // 16) for n in SIXTEENTHS)]
    some, early = (",".join(map(str, part)) for part in (layers, layers[:2]))
    pairs = ",".join(f"{a}/{b}" for a, b in combinations(layers, 2))
    return (
        f"uniform:layer={{0,{some}}}",
        "divprune:positions={keep,pack}",
        f"fastv:layer={{{some}}}",
        *([f"feather:layers={{{pairs}}}"] if pairs else []),
        f"divprune:positions=keep + fastv:layer={{{some}}}",
        f"p_sigmoid:of=(fastv:layer={{{early}}}),steepness={{0.25,0.5,1,2,4}}",
    )


def candidates(
    wanted: Sequence[str | PruningPolicy], checkpoint: Checkpoint
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """By name what to try, and by name why something of a sweep is not: a layer the decoder does not have, say.

    Raises:
        InputError: not a list of texts and policies, broken braces, or a text of which nothing at all can be made: what its first reading says.
    """
    check_listed(wanted)
    depth = checkpoint.config.text_config.num_hidden_layers
    found: dict[str, Candidate] = {}
    left_out: dict[str, str] = {}
    for some in wanted or default_policies(depth):
        if isinstance(some, PruningPolicy):
            checkpoint.check_depth([some])
            found[str(some)] = some
            continue
        made, errors = {}, {}
        for text in expand(some, depth):
            try:
                made[text] = _read(text, checkpoint)
            except InputError as error:
                errors[text] = error
        if not made:
            raise next(iter(errors.values()))
        found |= made
        left_out |= {text: str(error) for text, error in errors.items()}
    return found, left_out


def expand(text: str, depth: int) -> list[str]:
    """All texts that braces stand for, as in a shell: alternatives ``{2,5}``, ranges ``{2..5}`` and ``{2..12..4}``.

    ``{2..}`` ends at the last of ``depth`` decoder layers. Several braces give every combination.

    Raises:
        InputError: braces that do not match, stand in one another, or hold nothing.

    Example:
        >>> expand("feather:layers=2/{4..6}", depth=8)
        ['feather:layers=2/4', 'feather:layers=2/5', 'feather:layers=2/6']
        >>> expand("fastv:layer={5..},rows={last,text}", depth=7)[1:3]
        ['fastv:layer=5,rows=text', 'fastv:layer=6,rows=last']
    """
    fixed = BRACES.split(text)[::2]
    matched = not any(brace in part for part in fixed for brace in "{}")
    check(matched, "policy", "braces {...} that match and hold none", repr(text))
    choices = [
        [one for part in inner.split(",") for one in _choices(part.strip(), depth, text)]
        for inner in BRACES.findall(text)
    ]
    texts = (
        "".join(a + b for a, b in zip(fixed, (*chosen, ""), strict=True)) for chosen in product(*choices)
    )
    return list(dict.fromkeys(texts))


def _choices(part: str, depth: int, text: str) -> list[str]:
    """What one part between commas stands for."""
    match = RANGE.fullmatch(part)
    if match is None:
        check(bool(part) and ".." not in part, "policy", "alternatives as {2,5}, {2..5} or {2..}", repr(text))
        return [part]
    first, last, step = match.groups()
    numbers = range(int(first), int(last or depth - 1) + 1, int(step or 1) or 1)
    check(
        len(numbers) > 0 and step != "0",
        "policy",
        f"a range that ascends, in steps of 1 or more, of {depth} layers",
        repr(text),
    )
    return [str(number) for number in numbers]


def _read(text: str, checkpoint: Checkpoint) -> Candidate:
    schedule = read_schedule(text)
    made = policy_from(text) if schedule is None else schedule
    checkpoint.check_depth([made if isinstance(made, PruningPolicy) else made.of])
    return made

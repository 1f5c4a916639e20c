"""Reads what lmms-eval asks for: the policy, batches of requests, generation settings, and where an answer ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlmprune.errors import check
from vlmprune.images import as_rgb, open_rgb
from vlmprune.policies.base import PruningPolicy
from vlmprune.policies.recipe import policy_from
from vlmprune.smaller import Smaller

UNPRUNED = "none"
PARAGRAPH = "\n\n"
SAMPLING = ("temperature", "top_p", "top_k")


def read_policy(given: str | Mapping[str, Any]) -> PruningPolicy | Smaller | None:
    """Make a policy from what ``policy_from`` reads; None for ``none``, and ``smaller:keep=...`` for smaller pictures.

    In a text ``;`` stands between the fields, ``NAME[:field=value;...]``: lmms-eval splits its ``--model_args`` at commas.

    Raises:
        InputError: as ``policy_from``, or as ``Smaller.read``.
    """
    check(isinstance(given, str | Mapping), "policy", "NAME[:field=value;...] or none", repr(given))
    source = given.replace(";", ",") if isinstance(given, str) else given
    if source == UNPRUNED:
        return None
    return (Smaller.read(source) if isinstance(source, str) else None) or policy_from(source)


def read_count(name: str, given: object) -> int:
    """lmms-eval hands over what was typed. Raises InputError for anything but a whole number from 1."""
    text = str(given)
    check(text.isdecimal() and int(text) >= 1, name, "a whole number, at least 1", repr(given))
    return int(text)


def make_batches(requests: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Numbers of the requests, batch by batch: of one task and one set of generation settings, longest text first.

    Args:
        requests: lmms-eval's chat requests, ``args`` = (context, doc to messages, settings, document, task, split).
        size: requests a batch.
    """
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        _, _, settings, _, task, split = request.args
        groups[task, split, repr(sorted(settings.items()))].append(number)
    for members in groups.values():
        members.sort(key=lambda number: -len(requests[number].args[0]))
        yield from (members[at : at + size] for at in range(0, len(members), size))


def read_image(given: object, task: str) -> Image.Image:
    """A request's image, a picture or the path of one. Raises InputError for anything else, and for an unreadable file."""
    if isinstance(given, Image.Image):
        return as_rgb(given)
    check(isinstance(given, str | Path), task, "images as pictures or paths", type(given).__name__)
    return open_rgb(Path(str(given)), task)


def read_generation(asked: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as arguments of ``generate``; greedy unless it names a temperature above 0 and does not say
    ``do_sample: false``.

    Only these are read, like in lmms-eval's own ``llava_hf``: other entries are about other models' preprocessing.

    Args:
        asked: the task's settings.
        limit: new tokens, where the task names no number.
    """
    sampled = (asked.get("temperature") or 0) > 0 and asked.get("do_sample") is not False
    return {
        "max_new_tokens": int(asked.get("max_new_tokens") or limit),
        "num_beams": int(asked.get("num_beams") or 1),
        "do_sample": sampled,
        **{name: asked.get(name) if sampled else None for name in SAMPLING},
    }


def cut(answer: str, until: str | Sequence[str] | None) -> str:
    """The answer up to the first of the strings at which it has to stop.

    A blank line is none: lmms-eval puts it into every task that names no string, and it would cut answers to their first
    paragraph. Its own models ignore it too.
    """
    for stop in [until] if isinstance(until, str) else until or ():
        answer = answer.split(stop, 1)[0] if stop not in ("", PARAGRAPH) else answer
    return answer

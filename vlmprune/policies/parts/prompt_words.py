"""A prompt's token ids read as words: what is asked about its images, and where a text about an image belongs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, Protocol

from vlmprune.errors import check


class Tokenizer(Protocol):
    """What is asked of a tokenizer; transformers' are such ones."""

    chat_template: Any
    all_special_tokens: Sequence[str]
    added_tokens_decoder: Mapping[int, Any]
    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Ids of a text, under "input_ids"."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        ...


def is_tokenizer(given: object) -> bool:
    """Whether it has all that is asked of one. A processor has not."""
    return callable(given) and all(hasattr(given, name) for name in (*Tokenizer.__annotations__, "decode"))


MARKS = ("firstquestion", "firstanswer", "secondquestion")
"""Stand-ins for the texts of a conversation, which no template contains."""


def question_of(ids: Sequence[int], last: int, tokenizer: Tokenizer) -> str:
    """What is asked: the words of the latest user turn, or of its part behind the last image, at ``ids[last]``.

    Where nothing stands behind an image in that turn, it is the words in front of it. The tokenizer's chat template tells
    where a turn begins and ends; without one it is all text behind that image. Special tokens are left out.

    Args:
        ids: of one prompt, -1 = padding.
        last: the place of the last visual token.
        tokenizer: the model's.
    """
    header, footer = turn_of(tokenizer)
    asked = _words(_latest(_decoded(ids[last + 1 :], tokenizer), header, footer), tokenizer)
    if asked or not header:
        return asked
    _, opened = _parted(_decoded(ids[:last], tokenizer), header)
    return _words(_latest(opened or "", header, footer), tokenizer)


def without_special(text: str, tokenizer: Tokenizer) -> str:
    """A text without what the tokenizer would read as special tokens: these end turns and stand for images."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    for token in {*tokenizer.all_special_tokens, *added}:
        text = text.replace(token, " ")
    return text


def _words(text: str, tokenizer: Tokenizer) -> str:
    """The same with single blanks."""
    return " ".join(without_special(text, tokenizer).split())


def _decoded(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode([i for i in ids if i >= 0])


def _latest(text: str, header: str, footer: str) -> str:
    """The latest user turn of a text that begins within one."""
    turn, rest = _parted(text, footer)
    while header and rest is not None:
        _, later = _parted(rest, header)
        if later is None:
            break
        turn, rest = _parted(later, footer)
    return turn


def _parted(text: str, mark: str) -> tuple[str, str | None]:
    """What stands before and behind a mark's first place in a text, None = nowhere; no mark parts nothing.

    Decoding may add blanks beside special tokens: they do not count.
    """
    if not mark:
        return text, text
    found = re.search(r"\s*".join(map(re.escape, "".join(mark.split()))), text)
    return (text, None) if found is None else (text[: found.start()], text[found.end() :])


def turn_of(tokenizer: Any) -> tuple[str, str]:
    """What a chat template writes in front of a further user turn, and behind it where the answer begins; "" = unknown."""
    template = tokenizer.chat_template  # one, or several by name
    return _turn_of(tokenizer, str(template)) if template else ("", "")


@lru_cache(maxsize=8)
def _turn_of(tokenizer: Any, template: str) -> tuple[str, str]:
    for wrap in (str, lambda text: [{"type": "text", "text": text}]):  # templates take one form or the other
        talk = [
            {"role": role, "content": wrap(mark)}
            for role, mark in zip(("user", "assistant", "user"), MARKS, strict=True)
        ]
        text = _rendered(tokenizer, talk)
        if all(text.count(mark) == 1 for mark in MARKS):
            first, rest = text.split(MARKS[0])
            later, footer = rest.split(MARKS[1])[1].split(MARKS[2])
            # what both user turns begin with; in the first a system prompt may stand before it, in later ones an end
            ends = zip(reversed(first.rstrip()), reversed(later.rstrip()), strict=False)
            header = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], ends))[::-1]
            return header.strip(), footer.strip()
    return "", ""


def _rendered(tokenizer: Any, talk: list[dict[str, Any]]) -> str:
    """A conversation up to where the next answer begins; "" if the template does not take this form, or none is the default."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, KeyError, ValueError):
        return ""


def places_behind(ids: Sequence[int], images: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> list[int]:
    """For each image the place in ``ids`` in front of which a text about it goes: behind what closes the image.

    That is line ends, blanks and special tokens, but not the end of the turn, nor what opens the next image (as much of it
    as stands in front of the first one, too). Never behind the last token, which the answer goes on from.

    Args:
        ids: of one prompt, -1 = padding.
        images: the places of the first and the last visual token of each.
        tokenizer: the model's.

    Raises:
        InputError: no text follows the last image.
    """
    end = max(i for i, token in enumerate(ids) if token >= 0)
    starts = [first for first, _ in images[1:]]
    found = []
    for (_, last), following in zip(images, [*starts, end + 1], strict=True):
        at = last + 1
        while at < following and closes(ids[at], tokenizer):
            at += 1
        if at == following <= end:  # nothing but such tokens up to the next image
            at -= _opening(ids, images[0][0], last + 1, following)
        at = min(at, end)
        check(last < at, "prompt", "words behind its last image", "none")
        found.append(at)
    return found


def _opening(ids: Sequence[int], first: int, start: int, end: int) -> int:
    """How many of the tokens ``ids[start:end]`` between two images open the second one: those that open the first one, too."""
    shared = 0
    while shared < min(end - start - 1, first) and ids[end - 1 - shared] == ids[first - 1 - shared] >= 0:
        shared += 1
    return shared


def closes(token: int, tokenizer: Tokenizer) -> bool:
    """Whether a token behind an image still belongs to it: blank, or special and not the end of a turn."""
    if token < 0 or token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return False
    if tokenizer.decode([token], skip_special_tokens=True).strip():
        return False
    text = tokenizer.decode([token]).strip()
    return not text or all(text not in mark for mark in turn_of(tokenizer))

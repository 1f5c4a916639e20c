"""Captions to pretrain ACCM's captioner on: what pruning drops of a scene, a question, and true notes to write of it.

The mapper does not see the question, so a picture is mapped once for several questions and captions about it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accuracy import overlap
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from world.notes import Words, about, everything, name, place, says
from world.questions import Question, ask
from world.scenes import Scene, make_scene
from world.words import FAMILIES

from training.batches import IGNORED
from vlmprune.compensation import Captioner, Discarded

KINDS = {
    "asked": "the note with the answer",
    "general": "a note of any thing or of the sign, whatever is asked",
    "scene": "a note of everything, whatever is asked",
}
KEPT = (0.1, 0.06, 0.03)  # shares of the tokens that stay: pruning 90, 94 and 97 %
_PLACE = re.compile(r"(?P<name>\w+ \w+ \w+|sign) row (?P<cell>\d+ col \d+)(?: box (?P<box>\d+ \d+ \d+ \d+))?")
_LETTERS = re.compile(r"sign (?P<letters>[A-Z] [A-Z] [A-Z])")
_TRIES = 8  # a random question may be impossible to ask


@dataclass(frozen=True)
class Sheet:
    """One scene, the places ``[R]`` that pruning drops of it, and pairs of question and caption."""

    scene: Scene
    dropped: Tensor
    pairs: tuple[tuple[Question, Words], ...]


def make_sheets(seeds: Sequence[int], side: int, tokens: int, kind: str, pairs: int) -> list[Sheet]:
    """The sheets of these scenes, the same whenever they are made; all drop as many of ``tokens``."""
    share = KEPT[seeds[0] % len(KEPT)]
    return [_sheet(seed, side, tokens, max(1, round(share * tokens)), kind, pairs) for seed in seeds]


def _sheet(seed: int, side: int, tokens: int, keep: int, kind: str, pairs: int) -> Sheet:
    scene, rng = make_scene(seed, side), np.random.default_rng((seed, 11))
    asked = []
    while len(asked) < pairs:
        draws = (ask(scene, str(rng.choice(FAMILIES)), rng) for _ in range(_TRIES))
        question = next((draw for draw in draws if draw is not None), None)
        if question is not None:
            asked.append((question, write_caption(scene, question, kind, rng)))
    if rng.random() < 0.5:
        kept = rng.permutation(tokens)[:keep]
    else:  # evenly spaced
        kept = (rng.integers(tokens) + np.arange(keep) * tokens // keep) % tokens
    dropped = np.delete(np.arange(tokens), kept)
    return Sheet(scene, torch.from_numpy(dropped), tuple(asked))


def write_caption(scene: Scene, question: Question, kind: str, rng: np.random.Generator) -> Words:
    """A caption of this kind (see ``KINDS``), notes in their first wordings."""
    if kind == "asked":
        return about(scene, question)
    if kind == "scene":
        return tuple(word for note in everything(scene) for word in note)
    notes = [place(scene, name(thing), thing.box) for thing in scene.things]
    if scene.sign:
        notes += [says(scene), place(scene, "sign", scene.sign.box)]
    return notes[rng.integers(len(notes))]


def caption_loss(captioner: Captioner, features: Tensor, sheets: Sequence[Sheet]) -> Tensor:
    """Mean cross entropy of all captions' tokens with their ends, ``features [I, N, D]`` of all the pictures' tokens.

    What the captioner's ``log_likelihood`` says of each of the pairs (a test holds them together), the pictures mapped once.
    """
    tokenizer, embed = captioner.tokenizer, captioner.language_model.get_input_embeddings()
    seen = [Discarded(f, sheet.dropped, "?") for f, sheet in zip(features, sheets, strict=True)]
    rows, labels = [], []
    for prefix, sheet in zip(captioner.prefixes(seen), sheets, strict=True):
        for question, caption in sheet.pairs:
            asked = tokenizer.encode(" ".join(question.words), return_tensors="pt")[0]
            said = tokenizer.encode(" ".join(caption), add_special_tokens=False)
            said = torch.tensor(said if captioner.config.end else [*said, tokenizer.eos_token_id])
            rows.append(torch.cat([embed(asked), prefix, embed(said[:-1])]))
            labels.append(F.pad(said, (len(asked) + len(prefix) - 1, 0), value=IGNORED))
    wanted = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    mask = pad_sequence([torch.ones_like(label) for label in labels], batch_first=True)
    inputs = pad_sequence(rows, batch_first=True)
    logits = captioner.language_model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def score_captions(pairs: Sequence[tuple[Scene, Question]], captions: Sequence[str]) -> dict[str, float]:
    """Shares of truth in captions about questions about scenes.

    Returns:
        Of all notes of a place: ``named``, something has that size, colour and shape (or is the sign); ``placed``, and is in
        that cell; ``boxed``, and its box has IoU >= 0.5. ``letters``: of all notes of what the sign says, those that are right.
        ``found``: of all that could be said of a scene (things, letters), what is said. ``tells``: of the captions, those
        with the answer to their question, and that by family.
    """
    notes = {"named": [], "placed": [], "boxed": [], "letters": [], "found": []}
    tells: dict[str, list[bool]] = {"tells": []}
    for (scene, question), caption in zip(pairs, captions, strict=True):
        said = [_read(note) for note in caption.split(" .")]
        true = [_read(" ".join(note[:-1])) for note in everything(scene, kind="both")]
        for note in filter(None, said):
            if note.name is None:
                notes["letters"].append(note in true)
                continue
            same = [t for t in true if t.name == note.name]
            notes["named"].append(bool(same))
            notes["placed"].append(any(t.cell == note.cell for t in same))
            if note.box:
                notes["boxed"].append(any(overlap(t.box, note.box) >= 0.5 for t in same))
        notes["found"] += [any(s and (s.name, s.letters) == (t.name, t.letters) for s in said) for t in true]
        right = _tells(scene, question, caption)
        tells["tells"].append(right)
        tells.setdefault(question.family, []).append(right)
    return {key: float(np.mean(some)) for key, some in (notes | tells).items() if some}


def _tells(scene: Scene, question: Question, caption: str) -> bool:
    target = about(scene, question)
    wanted, said = _read(" ".join(target[:-1])), [_read(note) for note in caption.split(" .")]
    if wanted is None:  # a number of things, or that there is none
        return " ".join(target) in caption
    part = {"cell": "cell", "read": "letters"}.get(question.family, "name")
    if question.family == "box":
        return any(note and note.box and overlap(note.box, wanted.box) >= 0.5 for note in said)
    return any(note and getattr(note, part) == getattr(wanted, part) for note in said)


class _Note(NamedTuple):
    """What a note says; None where it does not."""

    name: str | None = None
    cell: str | None = None
    box: str | None = None
    letters: str | None = None


def _read(note: str) -> _Note | None:
    """A note in its first wording, without full stop; None for one of numbers or of what is not there."""
    if found := _PLACE.fullmatch(note.strip()):
        return _Note(*found.group("name", "cell", "box"))
    if found := _LETTERS.fullmatch(note.strip()):
        return _Note(letters=found.group("letters"))
    return None

"""What is compared at one number of visual tokens: no words, true words, the words of a captioner, and other images' words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vlmprune import ACCM, Uniform
from vlmprune.compensation import Caption, Compensator, Describer, Discarded, Known, load_compensator
from vlmprune.eval.arms import Arm
from vlmprune.policies.base import PruningPolicy

CANDIDATES = 3


@dataclass(frozen=True)
class Told(Arm):
    """An arm under a name, which may be told a text for every question of every batch.

    Attributes:
        name: what tells its answers from others', with the selection and its budget.
        texts: of each batch in turn, one a question.
    """

    name: str = ""
    texts: tuple[tuple[str, ...], ...] = ()

    @property
    def key(self) -> str:
        """The name: a repr of a captioner would not tell one from another."""
        return self.name

    def for_batch(self, number: int, regions: Sequence[object]) -> PruningPolicy | None:
        """The policy, told this batch's texts."""
        if not self.texts:
            return self.policy
        assert isinstance(self.policy, ACCM)
        return replace(self.policy, compensator=Known(self.texts[number]))


class Swapped:
    """Gives each image what a compensator says of another image of the call.

    Args:
        compensator: whose texts are handed on.
    """

    def __init__(self, compensator: Compensator) -> None:
        self.compensator = compensator

    def __call__(self, images: Sequence[Discarded], candidates: int) -> list[Caption]:
        """The text of the next image in the call whose features are others; "" where there is none."""
        captions = self.compensator(images, candidates)
        out = []
        for i, image in enumerate(images):
            rest = [*range(i + 1, len(images)), *range(i)]
            other = next((j for j in rest if not torch.equal(images[j].features, image.features)), None)
            out.append(Caption("") if other is None else captions[other])
        return out


def make_arms(
    selection: PruningPolicy, keep: int, folders: Sequence[Path], notes: tuple[tuple[str, ...], ...]
) -> list[Told]:
    """The arms of one selection at one budget; those with words once for every compensator.

    Args:
        selection: what chooses the tokens that stay.
        keep: how many.
        folders: of compensators that were trained with different seeds; one without selector has no full ACCM.
        notes: for every batch, true notes about what is asked: the bound of what words can do.
    """
    bare = ACCM(selection, Known([]), keep=keep, candidates=CANDIDATES, wording="{}")
    # ACCM has given the selection its budget.
    plain, at = bare.selected, f"{type(selection).__name__} {keep}"
    arms = [
        Told("no words", keep, plain, name=f"{at}: no words"),
        Told("true note", keep, bare, name=f"{at}: true note", texts=notes),
    ]
    for seed, folder in enumerate(folders):
        loaded = load_compensator(folder)
        captioner = Describer(loaded.captioner).eval()
        ways: dict[str, Compensator] = {
            "another image's caption": Swapped(captioner),
            "likeliest caption": captioner,
        }
        if loaded.selector is not None:
            ways["ACCM"] = loaded
        for method, compensator in ways.items():
            policy = replace(bare, compensator=compensator)
            arms.append(Told(method, keep, policy, seed, name=f"{at}: {method} of {folder}"))
    return arms


def spend(keep: int, cut: float, cut_at: dict[int, float]) -> Told:
    """Uniform tokens as many as cost no less than what leaves a cut of ``cut``.

    Args:
        keep: the budget that it stands beside.
        cut: the share of the FLOPs that the words of ``keep`` tokens leave saved.
        cut_at: the cut of every number of tokens.
    """
    more = min((count for count, saved in cut_at.items() if saved <= cut), default=max(cut_at))
    return Told("more tokens", keep, Uniform(layer=0, keep=more), name=f"Uniform {more}: no words")

"""The compensator of ACCM: a captioner writes what the dropped tokens show, a selector takes what helps most.

Source: ACCM: Adaptive Content Compensation Method, ACM MM 2025, arXiv 2508.01236.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vlmprune.compensation.captioner import Captioner
from vlmprune.compensation.interface import Caption, Discarded
from vlmprune.compensation.parts import Part, evaluating
from vlmprune.compensation.saving import replacing, standing
from vlmprune.compensation.selector import Selector
from vlmprune.errors import InputError, check, first_line

PARTS: dict[str, type[Part]] = {"captioner": Captioner, "selector": Selector}
CONTENTS = "compensator.json"


class Describer(nn.Module):
    """Words for what pruning drops, chosen for the question; implements ``vlmprune.compensation.Compensator``.

    The same input gives the same captions: a beam search, no sampling, no dropout in whatever mode it is. Nothing is
    differentiated; train its parts with ``Captioner.log_likelihood`` and ``Selector.forward``.

    Args:
        captioner: writes the candidates, of all images of a call together.
        selector: chooses one for each image; None = the likeliest is taken.

    Source: the Adaptive Content Compensation Method (ACCM), ACM MM 2025, https://arxiv.org/abs/2508.01236.
    """

    def __init__(self, captioner: Captioner, selector: Selector | None = None) -> None:
        super().__init__()
        self.captioner = captioner
        self.selector = selector

    @torch.no_grad()
    def forward(self, images: Sequence[Discarded], candidates: int = 3) -> list[Caption]:
        """One caption for each of these images, with the candidates it was chosen from and an equal share of the FLOPs.

        Args:
            images: at least one, on any device and of any floating type.
            candidates: how many are written; of a single one nothing is chosen, and the selector costs nothing.

        Raises:
            InputError: features of another width than the captioner's, an empty question, ``candidates`` below 1.
        """
        with evaluating(self):
            drafts = self.captioner.draft(images, candidates)
            best, spent = self._best([image.question for image in images], drafts.texts)
        share = (drafts.flops + spent) // len(images)
        chosen = zip(drafts.texts, best, strict=True)
        return [Caption(texts[i], tuple(texts), share) for texts, i in chosen]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``folder/captioner``, ``folder/selector`` and what they are; until all is written, the old one stands."""
        parts = {name: part for name in PARTS if (part := getattr(self, name)) is not None}
        with replacing(folder) as beside:
            for name, part in parts.items():
                part.save_pretrained(beside / name)
            (beside / CONTENTS).write_text(json.dumps({"parts": [*parts]}) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Describer:
        """What ``save_pretrained`` wrote, in the type it was written, on the CPU, in evaluation mode.

        Raises:
            InputError: no such folder, no compensator in it, a part that is missing, damaged or something else.
        """
        check(
            standing(folder).is_dir(),
            "folder",
            "a folder of a compensator",
            f"{folder}, which does not exist",
        )
        found = standing(folder)
        names = _names(found / CONTENTS)
        return cls(**{name: _read(found / name, PARTS[name]) for name in names}).eval()

    def _best(self, questions: list[str], texts: list[list[str]]) -> tuple[list[int], int]:
        """Which of each image's texts to take, and what choosing cost; of equal ones the likelier."""
        if self.selector is None or len(texts[0]) == 1:
            return [0] * len(texts), 0
        logits, spent = self.selector.judge(questions, texts)
        return [max(range(len(row)), key=row.__getitem__) for row in logits.tolist()], spent


def load_compensator(folder: str | Path) -> Describer:
    """The compensator saved in ``folder``; see ``Describer.from_pretrained``."""
    return Describer.from_pretrained(folder)


def _names(contents: Path) -> list[str]:
    """Which parts were saved."""
    expected = f"one that a compensator was saved in, with {CONTENTS}"
    check(contents.is_file(), "folder", expected, contents.parent)
    try:
        names = json.loads(contents.read_text())["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{CONTENTS}: expected a list of parts, got {first_line(error)} in {contents}"
        ) from error
    known = isinstance(names, list) and "captioner" in names and {*names} <= {*PARTS}
    check(known, CONTENTS, "the parts captioner and, if any, selector", names)
    return names


def _read(folder: Path, kind: type[Part]) -> Any:
    """One part, every weight of which was there: transformers would make missing ones at random, and only say so."""
    name, expected = folder.name, kind.config_class.model_type
    check((folder / "config.json").is_file(), name, "config.json and weights", f"none in {folder}")
    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type")
        check(found == expected, name, f"a checkpoint of {expected}", f"{found} in {folder}")
        model, report = kind.from_pretrained(folder, output_loading_info=True)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{name}: expected a checkpoint in {folder}, got {first_line(error)}") from error
    wrong = {what: sorted(keys)[:3] for what, keys in report.items() if keys}
    check(not wrong, name, f"all weights of a {expected} in {folder}", wrong)
    return model

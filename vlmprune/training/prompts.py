"""Prompts with the true answer behind them, so that one forward gives the distribution at each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmprune.checkpoints import Checkpoint, build_text, make_inputs
from vlmprune.errors import InputError, check
from vlmprune.images import open_rgb
from vlmprune.training.samples import Sample


@dataclass(frozen=True, eq=False)
class Prompts:
    """A batch in teacher forcing, on the model's device.

    Every row ends with as many tokens as the longest answer has. A shorter one goes on with its last token: what stands
    to the right of it is seen by none of its tokens, so that neither a mask nor a grouping by length is needed.

    Attributes:
        inputs: what the model takes, prompts padded on the left.
        rows: how many of the last rows' logits are asked for: those that predict an answer's tokens, and its end.
        counts: ``[B]`` int64, how many of these are each sample's own: its answer's tokens and the end.
    """

    inputs: dict[str, Any]
    rows: int
    counts: Tensor


def make_prompts(checkpoint: Checkpoint, samples: Sequence[Sample], longest: int) -> Prompts:
    """Prompts in the checkpoint's chat template, with the answers' tokens behind them.

    Args:
        checkpoint: whose processor and model.
        samples: of any answers.
        longest: tokens of an answer; what is longer is cut off there. 0 = none stands behind.

    Raises:
        InputError: an image that cannot be read, a question that does not fit the template, an answer without tokens or
            with an image placeholder; each with the sample's file and line.
    """
    processor, model = checkpoint.processor, checkpoint.model
    texts = [_text(processor, sample) for sample in samples]
    images = [[open_rgb(sample.image, sample.where)] for sample in samples]
    given = make_inputs(processor, texts, images, ", ".join(sample.where for sample in samples))
    answers = [_answer(checkpoint, sample)[:longest] if longest else [] for sample in samples]
    most = max(map(len, answers))
    ids = torch.tensor([answer + answer[-1:] * (most - len(answer)) for answer in answers], dtype=torch.int64)
    shape = given["input_ids"].shape
    for name in list(given):
        part = given[name]
        if isinstance(part, Tensor) and part.shape == shape:  # ids, mask, and kinds of tokens (0 = text)
            fill = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            tail = fill.get(name, torch.zeros_like(ids)).to(part.dtype)
            given[name] = torch.cat([part, tail], 1)
    given = given.to(model.device, dtype=model.dtype)
    counts = torch.tensor([len(answer) + 1 for answer in answers], device=model.device)
    return Prompts(dict(given), most + 1, counts)


def _text(processor: Any, sample: Sample) -> str:
    try:
        return build_text(processor, sample.question, 1)
    except InputError as error:
        raise InputError(f"{sample.where}: {error}") from error


def _answer(checkpoint: Checkpoint, sample: Sample) -> list[int]:
    """Tokenized on its own, as a model that answers would say it: the prompt's last token is no part of it."""
    ids = checkpoint.processor.tokenizer(sample.answer.strip(), add_special_tokens=False)["input_ids"]
    expected = "an answer of at least one token, none of them an image"
    fine = bool(ids) and checkpoint.config.image_token_id not in ids
    check(fine, sample.where, expected, repr(sample.answer))
    return list(ids)

"""What is fixed when a training run starts."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from vlmprune.errors import check
from vlmprune.policies.methods.accm import WORDING
from vlmprune.training.objective import Weighting

WARM_UP = 1000
"""Steps, as published, in a run of at least ten times as many."""


@dataclass(frozen=True)
class Plan:
    """How to train. Where nothing else is said, the numbers are those of the released code of ACCM.

    Args:
        selection: the policy that drops tokens, one before the language model, as typed on the command line.
        keep: visual tokens per image that stay (int), or their share (float).
        wording: what joins the prompt, with ``{}`` for the caption.
        candidates: captions written and compared, at least 2.
        batch_size: questions a step.
        epochs: how often every question comes; a part of one is allowed.
        steps: updates, in place of epochs.
        captioner_rate, selector_rate: learning rates of AdamW, after the warm-up.
        warm_up: steps until they are reached; they fall to zero from there on. None = 1000, or a tenth of the run.
        clip: norm at which each part's gradient is cut off (the paper has none).
        weighting: "batch", one advantage for a batch, as released; "sample", each sample its own.
        train_mapper: also train the captioner's mapper, which the paper leaves as it was pretrained.
        train_encoder: whether to train the selector's text encoder; None = as its configuration says (the paper does not).
        dpo: None, or the beta of Direct Preference Optimization: the captioner is then trained to prefer the best
            candidate to the worst, held by a frozen copy of its start.
        imitate: the captioner learns to say the ``caption`` of each line of the data, and nothing else is done: how a new
            one starts. The selector, ``dpo`` and all that concerns candidates and answers have no part in it.
        sample: candidates are drawn and not beams, which may be too alike.
        max_answer_tokens: what is longer is cut off there.
        rows: prompts at most in one call of the model; None = all candidates of a batch together.
        seed: of the order of the data, of dropout and of what is drawn.

    Raises:
        InputError: a number out of range.
    """

    selection: str
    keep: int | float = 36
    wording: str = WORDING
    candidates: int = 3
    batch_size: int = 4
    epochs: float = 1.0
    steps: int | None = None
    captioner_rate: float = 1e-6
    selector_rate: float = 2e-5
    warm_up: int | None = None
    clip: float = 1.0
    weighting: Weighting = "batch"
    train_mapper: bool = False
    train_encoder: bool | None = None
    dpo: float | None = None
    imitate: bool = False
    sample: bool = False
    max_answer_tokens: int = 64
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        whole = {"candidates": 2, "batch_size": 1, "max_answer_tokens": 1, "seed": 0}
        whole |= {
            name: least
            for name, least in (("steps", 1), ("warm_up", 0), ("rows", self.batch_size))
            if getattr(self, name) is not None
        }
        for name, least in whole.items():
            value = getattr(self, name)
            check(
                isinstance(value, int) and value >= least, name, f"a whole number of {least} or more", value
            )
        above = {"epochs", "clip"} | ({"dpo"} if self.dpo is not None else set())
        for name in sorted(above):
            check(getattr(self, name) > 0, name, "a number above 0", getattr(self, name))
        for name in ("captioner_rate", "selector_rate"):
            check(getattr(self, name) >= 0, name, "a learning rate, 0 or more", getattr(self, name))
        check(not self.imitate or self.dpo is None, "imitate", "False with dpo", self.imitate)
        known = self.weighting in ("batch", "sample")
        check(known, "weighting", "'batch' or 'sample'", repr(self.weighting))

    def total(self, samples: int) -> int:
        """Updates of the whole run, with so many samples."""
        return self.steps if self.steps is not None else max(1, ceil(self.epochs * samples / self.batch_size))

    def warming(self, total: int) -> int:
        """Updates of the warm-up, in a run of so many."""
        return self.warm_up if self.warm_up is not None else min(WARM_UP, total // 10)

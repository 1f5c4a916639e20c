"""One step after the other: candidates are written, judged, and the parts learn which was best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_scheduler

from vlmprune.compensation import Captioner, Describer, Discarded
from vlmprune.errors import ModelError
from vlmprune.training.objective import Verdict, judge, preference_loss, weighted
from vlmprune.training.plan import Plan
from vlmprune.training.referee import Case, Referee
from vlmprune.training.samples import Sample, Samples

Texts = Sequence[Sequence[str]]
"""Candidates of each sample."""


class Trainer:
    """A describer in training. What a step does depends on the plan, the step's number and the state alone."""

    def __init__(
        self,
        referee: Referee,
        describer: Describer,
        samples: Samples,
        plan: Plan,
        reference: Captioner | None = None,
    ) -> None:
        """Put everything on the referee's device.

        Args:
            referee: who judges.
            describer: what is trained, in place; its selector may be None.
            samples: what on.
            plan: how.
            reference: the frozen captioner of DPO; None = a copy of this describer's, as it is now.
        """
        device = referee.checkpoint.model.device
        self.referee, self.samples, self.plan, self.device = referee, samples, plan, device
        self.describer = describer.to(device).eval()
        self.reference: Captioner | None = None
        if plan.dpo is not None:
            kept = reference if reference is not None else deepcopy(describer.captioner)
            self.reference = kept.to(device).eval().requires_grad_(False)
        self._freeze()
        rates = [(describer.captioner, plan.captioner_rate), (describer.selector, plan.selector_rate)]
        groups = [
            {"params": [p for p in part.parameters() if p.requires_grad], "lr": rate}
            for part, rate in rates
            if part is not None
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.total = plan.total(len(samples.items))
        warming = plan.warming(self.total)
        self.schedule: Any = get_scheduler("linear", self.optimizer, warming, self.total)
        self.step = 0

    def train_step(self) -> dict[str, float]:
        """One update. Returns what was found before it: losses and, unless captions are imitated, what ``_found`` says.

        Raises:
            ModelError: something that is not finite; nothing is changed then.
        """
        with _seeded(self.plan.seed, self.step, self.device):
            batch = self.samples.batch(self.step, self.plan.batch_size, self.plan.seed)
            figures, losses = self._imitate(batch) if self.plan.imitate else self._compete(batch)
            torch.autograd.backward([*losses.values()])
        groups = self.optimizer.param_groups
        norms = [float(nn.utils.clip_grad_norm_(group["params"], self.plan.clip)) for group in groups]
        figures |= {name: float(loss.detach()) for name, loss in losses.items()}
        self._check_finite(figures | {"gradients": sum(norms)})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        return figures

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but for the describer's weights."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state, with a describer that has its weights."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]

    def _compete(self, batch: Sequence[Sample]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Candidates are compared, and the best is taught."""
        case = self.referee.hear(batch)
        texts = self._write(case.images)
        kl = self.referee.divergences(case, texts)
        verdict = judge(kl)
        figures = _found(case, texts, kl, verdict, self._pick(case.images, texts))
        return figures, self._losses(case.images, texts, verdict)

    def _imitate(self, batch: Sequence[Sample]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Given captions are taught: the loss is nats a token."""
        captioner, images = self.describer.captioner, self.referee.show(batch)
        captioner.train()
        likely, counts = captioner.log_likelihood(images, [sample.caption for sample in batch])
        captioner.eval()
        return {}, {"captioner": -likely.sum() / counts.sum()}

    def _check_finite(self, figures: dict[str, float]) -> None:
        """Before the weights are touched: what was saved last stays good."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise ModelError(
                    f"step {self.step + 1}: expected a finite number for {name}, got {value} (a model in float16 may "
                    "overflow: bfloat16 or float32 do not; else lower the rates)"
                )

    def _freeze(self) -> None:
        captioner, selector = self.describer.captioner, self.describer.selector
        captioner.requires_grad_(True)
        captioner.mapper.requires_grad_(self.plan.train_mapper)
        if selector is not None:
            if self.plan.train_encoder is not None:
                selector.config.train_text_encoder = self.plan.train_encoder
            selector.requires_grad_(True)
            selector.text_encoder.requires_grad_(selector.config.train_text_encoder)

    def _write(self, images: Sequence[Discarded]) -> Texts:
        return self.describer.captioner.draft(images, self.plan.candidates, self.plan.sample).texts

    @torch.no_grad()
    def _pick(self, images: Sequence[Discarded], texts: Texts) -> Tensor:
        """``[B]`` int64 which candidate would be taken: without a selector the likeliest, which comes first."""
        selector = self.describer.selector
        if selector is None:
            return torch.zeros(len(images), dtype=torch.int64, device=self.device)
        return selector([image.question for image in images], texts).argmax(1)

    def _losses(self, images: Sequence[Discarded], texts: Texts, verdict: Verdict) -> dict[str, Tensor]:
        """By part; nothing is random in them but dropout."""
        losses = {"captioner": self._captioner_loss(images, texts, verdict)}
        selector = self.describer.selector
        if selector is not None:
            selector.train()
            scores = selector([image.question for image in images], texts)
            selector.eval()
            each = F.cross_entropy(scores, verdict.best, reduction="none")
            ones = torch.ones_like(each)
            losses["selector"] = weighted(each, ones, verdict.margin, self.plan.weighting)
        return losses

    def _captioner_loss(self, images: Sequence[Discarded], texts: Texts, verdict: Verdict) -> Tensor:
        captioner = self.describer.captioner
        best = _chosen(texts, verdict.best)
        if self.reference is None or self.plan.dpo is None:
            captioner.train()
            likely, counts = captioner.log_likelihood(images, best)
            captioner.eval()
            return weighted(-likely, counts, verdict.margin, self.plan.weighting)
        # Without dropout, which would pass for a difference from the reference.
        worst = _chosen(texts, verdict.worst)
        with torch.no_grad():
            held = [self.reference.log_likelihood(images, some)[0] for some in (best, worst)]
        better, worse = (captioner.log_likelihood(images, some)[0] for some in (best, worst))
        return preference_loss(better - held[0], worse - held[1], self.plan.dpo)


def _chosen(texts: Texts, which: Tensor) -> list[str]:
    return [some[number] for some, number in zip(texts, which.tolist(), strict=True)]


def _found(case: Case, texts: Texts, kl: Tensor, verdict: Verdict, picked: Tensor) -> dict[str, float]:
    """The figures of a batch: means over its samples."""
    chosen = kl.gather(1, picked[:, None])
    best = kl.gather(1, verdict.best[:, None])
    figures = {
        "kl_none": case.silent,
        "kl_random": kl,
        "kl_chosen": chosen,
        "kl_best": best,
        "picked": (chosen <= best).float(),  # equal candidates are equally right
        "margin": verdict.margin,
    }
    distinct = sum(len({*some}) for some in texts) / len(texts)
    return {name: float(values.mean()) for name, values in figures.items()} | {"distinct": distinct}


@contextmanager
def _seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Random numbers of the step's own, whatever was drawn before it; the caller's go on as if nothing had been."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        draw = torch.Generator().manual_seed(seed)
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=draw)) + step)
        yield

"""Whether pruning a model gives what it should: this model, these versions, this attention implementation and precision.

Three things are compared on one prompt and on a padded batch, over some steps of greedy decoding:
    the unpruned model with the masked run that hides nothing: how far two right ways of computing lie apart;
    keeping every token with the unpruned model: equal to the bit;
    each policy with the masked run (``vlmprune.testing.masked``) that hides what the policy dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmprune.errors import BackendError, ModelError, NotPrunedError, check
from vlmprune.models import Run, find_parts, prune
from vlmprune.models.host.families import FAMILIES
from vlmprune.policies.base import Needs, PruningPolicy, Reduction, TokenContext
from vlmprune.policies.compose import Stages
from vlmprune.policies.methods.fastv import FastV
from vlmprune.policies.methods.random import Random
from vlmprune.policies.methods.uniform import Uniform
from vlmprune.testing.masked import masked_logits
from vlmprune.testing.model_report import ModelReport, Row, versions
from vlmprune.testing.pictures import Samples, make_inputs, samples_of
from vlmprune.testing.recorded import Answer, Recorded, as_reduction

STEPS = 4
FACTOR = 4.0
"""A pruned run may lie so many times as far from the masked run as the unpruned one lies from its own. On random models of
every family the ratio was between 0.2 and 3.7, in float32, bfloat16 and float16 alike."""
REFUSALS = (BackendError, ModelError, NotPrunedError)
"""What a run may raise and the report shows; anything else goes through, with its traceback."""


def check_model(
    model: nn.Module,
    policy: PruningPolicy | None = None,
    strict: bool = True,
    samples: Mapping[str, Samples] | None = None,
) -> ModelReport:
    """Compare pruned runs of a model with the same model whose dropped columns are masked.

    Prompts are made from the configuration: a few random pictures of unequal size and some words. That takes about as
    long as twenty short answers. In bfloat16 two right ways of computing lie so far apart that a fault may hide between
    them; float32 shows all of them. The model is left as it was.

    Args:
        model: a vision-language model as for ``vlmprune.prune``, with no policy attached.
        policy: what to check; None = those of ``default_policies``: random choices, so that
            no selection can hide what the wiring does.
        strict: raise unless the report is ok.
        samples: what stands in the prompts of each batch, by the batch's name, the last thing in each being words;
            None = ``samples_of`` in ``vlmprune.testing.pictures``.

    Returns:
        The report, which prints as a table.

    Raises:
        AssertionError: the report is not ok and ``strict``; the message is the report.
        ModelError, InputError: as for ``vlmprune.prune``, before anything has run.
        InputError: a policy whose words join the prompt (``ACCM``): its selection is what can be checked.

    Example:
        Not run where the docs are tested: it takes a model.

        >>> from vlmprune import FastV, testing
        >>> testing.check_model(model, FastV(layer=2)).summary  # doctest: +SKIP
        'ok: pruned runs give what the masked model gives'
    """
    parts = find_parts(model)
    config = parts.config
    policies = default_policies(config) if policy is None else [policy]
    for one in policies:
        with prune(model, one):
            pass
    chosen = samples_of(config) if samples is None else samples
    for sample in (sample for prompts in chosen.values() for sample in prompts):
        check(isinstance(sample[-1], int), "samples", "prompts that end in words", repr(sample))
    with _evaluating(model), torch.no_grad():
        batches = [_Batch(model, name, prompts) for name, prompts in chosen.items()]
        allowed = max(FACTOR * batch.noise + batch.last_place for batch in batches)
        rows = [row for batch in batches for row in batch.rows(policies, allowed)]
    report = ModelReport(
        model=type(parts.model).__name__,
        attention=parts.text.config._attn_implementation,
        dtype=str(parts.model.dtype).removeprefix("torch."),
        device=str(parts.model.device),
        versions=versions(),
        rows=tuple(rows),
    )
    if strict and not report.ok:
        raise AssertionError(str(report))
    return report


@dataclass(frozen=True)
class Rewritten(PruningPolicy):
    """A random half, backwards, each row half way to the first visual token, without gaps in the positions."""

    summary: ClassVar[str] = "everything that a policy may change"

    layer: int = 2

    @property
    def layers(self) -> tuple[int, ...]:
        """The one stage."""
        return (self.layer,)

    def needs(self, layer: int) -> Needs:
        """The rows."""
        return Needs(hidden=True)

    def select(self, ctx: TokenContext) -> Reduction:
        """The rows in their new order."""
        index = Random(self.layer).rank(ctx).index(ctx).sort(1, descending=True).values
        assert ctx.hidden is not None
        rows = ctx.hidden.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, ctx.hidden.shape[2]))
        return Reduction(index, rows.lerp(ctx.hidden[:, :1], 0.5), "pack")


def default_policies(config: Any) -> list[PruningPolicy]:
    """One that drops, one with two stages, one that changes all it may."""
    family, depth = FAMILIES[config.model_type], config.text_config.num_hidden_layers
    late = depth // 2
    found: list[PruningPolicy] = [Random(late, keep=0.3)]
    if late > 0:
        found.append(Stages([Random(0, keep=0.6, seed=1), FastV(late)]))
    if family.packs:
        found.append(Rewritten(late))
    return found


class _Batch:
    """Some prompts, what the unpruned model says to them, and the comparisons with that.

    Attributes:
        noise: how far the unpruned model lies from the masked run that hides nothing.
        last_place: of the largest logit; what is left where both ways happen to agree to the bit.
    """

    def __init__(self, model: Any, name: str, samples: Samples) -> None:
        parts = find_parts(model)
        self.model, self.name = model, name
        self.placeholders = list(parts.token_ids.values())
        inputs, _ = make_inputs(parts.config, samples)
        dtype, device = parts.model.dtype, parts.model.device
        self.inputs = {
            k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()
        }
        tokens, self.logits = self.generate()
        self.reference = masked_logits(model, self.inputs, tokens, {})
        self.noise = _largest(self.logits, self.reference)
        self.last_place = torch.finfo(dtype).eps * self.logits.abs().max().item()

    def generate(self) -> tuple[Tensor, Tensor]:
        """A greedy answer: tokens ``[B, T]``, and the logits ``[B, T, V]`` they were chosen by."""
        out = self.model.generate(
            **self.inputs,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            suppress_tokens=self.placeholders,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[:, -STEPS:], torch.stack(out.logits, 1)

    def rows(self, policies: list[PruningPolicy], allowed: float) -> list[Row]:
        """The comparisons, in the order of the module's docstring."""
        measured = self._row("unpruned with masked", self.logits, self.reference, None)
        return [measured, self._keep_all(), *(self._pruned(policy, allowed) for policy in policies)]

    def _keep_all(self) -> Row:
        """Pruning that drops nothing, with the unpruned model."""
        compared = "keep all with unpruned"
        try:
            with prune(self.model, Uniform(0, keep=1.0)):
                _, logits = self.generate()
        except REFUSALS as error:
            return self._refused(compared, error)
        return self._row(compared, logits, self.logits, 0.0)

    def _pruned(self, policy: PruningPolicy, allowed: float) -> Row:
        """A policy's run, with the run in which what it dropped is masked."""
        compared = f"{type(policy).__name__} at {', '.join(map(str, policy.layers))} with masked"
        recorded = Recorded(policy, earlier_kv=policy.earlier_kv, rectify=policy.rectify)
        try:
            with prune(self.model, recorded) as run:
                tokens, logits = self.generate()
        except REFUSALS as error:
            return self._refused(compared, error)
        answers = recorded.answers
        texts = any(as_reduction(answer).inserted is not None for _, answer in answers.values())
        check(
            not texts, "policy", "one without words, for which no mask can stand; its selection", repr(policy)
        )
        compact, standing = policy.earlier_kv == "compact", recorded.standing
        masked = masked_logits(self.model, self.inputs, tokens, answers, compact, standing)
        row = self._row(compared, logits, masked, allowed)
        effect = _largest(masked[:, 0], self.reference[:, 0])
        blind = effect <= allowed and any(_drops(answer) for answer in answers.values())
        doubt = f"pruning itself changes the logits by {effect:.2g} only" if blind else ""
        return replace(row, fault=row.fault or _wrong_record(run, policy, answers), doubt=doubt)

    def _row(self, compared: str, got: Tensor, want: Tensor, allowed: float | None) -> Row:
        """Two runs' logits, compared."""
        difference, same = _largest(got, want), got.argmax(-1) == want.argmax(-1)
        fault = ""
        if not isfinite(difference):
            fault = "the logits are not finite"
        elif allowed is not None and difference > allowed:
            fault = "the runs differ"
        return Row(self.name, compared, difference, allowed, int(same.sum()), same.numel(), fault)

    def _refused(self, compared: str, error: Exception) -> Row:
        """A run that ended with one of our errors."""
        return Row(self.name, compared, nan, None, 0, 0, f"{type(error).__name__}: {error}")


def _drops(said: Answer) -> bool:
    """Whether fewer tokens stay than entered."""
    entered, answer = said
    return bool((as_reduction(answer).index >= 0).sum() < (entered >= 0).sum())


def _wrong_record(run: Run, policy: PruningPolicy, answers: dict[int, Answer]) -> str:
    """What the run's record says otherwise than the policy, if anything."""
    if [stage.layer for stage in run.stages] != list(policy.layers):
        return f"the run recorded stages at {[stage.layer for stage in run.stages]}, not at {list(policy.layers)}"
    for stage in run.stages:
        positions, answer = answers[stage.layer]
        index = as_reduction(answer).index
        chosen = positions.gather(1, index.clamp(min=0)).masked_fill(index < 0, -1)
        if _numbers(chosen) != _numbers(stage.index):
            return f"the run recorded other tokens at layer {stage.layer} than the policy kept"
    return ""


def _numbers(index: Tensor) -> list[list[int]]:
    return [sorted(row[row >= 0].tolist()) for row in index]


def _largest(one: Tensor, other: Tensor) -> float:
    return (one.float() - other.float()).abs().max().item()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All of a model in evaluation mode; every module gets back the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training

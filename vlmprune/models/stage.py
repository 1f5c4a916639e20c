"""What happens at one stage: show the policy its context, turn its choice into a decision, apply the decision."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import ModelError
from vlmprune.models.choice import apply, carry_out
from vlmprune.models.decoder_reads import read_own_attention
from vlmprune.models.fused import Passes, why_not
from vlmprune.models.host.parts import Parts
from vlmprune.models.layout import Layout, last_rows, moved, text_rows
from vlmprune.models.prefill import Decision, Entering, Prefill, Rope
from vlmprune.models.vision_reads import VisionReads
from vlmprune.policies.answer import check_ranking, check_selection
from vlmprune.policies.base import (
    Positions,
    PruningPolicy,
    Ranking,
    Reduction,
    TokenContext,
    outcome,
)


class StageContext(TokenContext):
    """A context whose lists, those of its layout, are made when a policy looks at them: most need none of them."""

    def __init__(self, layout: Layout | None = None, **fields: Any) -> None:
        """Without a layout it is a copy, which has been given all lists: ``dataclasses.replace`` makes one."""
        self.__dict__.update(fields, _layout=layout)

    def __getattr__(self, name: str) -> Any:
        if name not in ("mask", "ordinals", "positions"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__dict__[name] = made = getattr(self._layout, name)
        return made


class StageRunner:
    """Runs the stages of one policy on one model."""

    def __init__(self, parts: Parts, policy: PruningPolicy, vision: VisionReads) -> None:
        self.parts, self.policy, self.vision = parts, policy, vision
        self.checked: set[int] = set()
        self.passes = Passes()

    def __call__(self, prefill: Prefill, i: int, hidden: Tensor, rope: Rope) -> Tensor:
        """Decide once which rows of ``hidden [B, n, D]`` survive into layer ``i``; apply it, again if that is replayed.

        ``rope`` has the tables of the unpruned chunk.
        """
        assert prefill.prompt is not None
        if i in prefill.decisions:
            made = prefill.decisions[i]
            return hidden if made is None else apply(made, hidden)
        entering = prefill.entering(i, hidden, rope)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            context = self._context(prefill, entering)
            ranking = self._ranking(context) if self.policy.ranks(i) else None
        path, layout = why_not(ranking, entering, self.policy), entering.layout
        if path is None and ranking is not None:
            backend = ops.backend_of("prune_tokens", hidden)
            path = f"one pass ({backend})"
            if ranking.keeps_all(layout.counts):
                short, numbers, made = hidden, None, None
            else:
                short, numbers, made = self.passes(ranking, entering, backend)
        else:
            short, numbers, made = self._choose(context, entering, ranking)
        if made is not None:
            _check_end(prefill, entering.first)
        prefill.prompt.record(i, layout, numbers, layout if made is None else made.layout, str(path))
        prefill.decisions[i] = made
        return short

    def _choose(
        self, context: TokenContext, entering: Entering, ranking: Ranking | None
    ) -> tuple[Tensor, Tensor, Decision | None]:
        """Ask the policy for its choice, or take that of its ranking, as a pass would; carry it out."""
        with torch.no_grad():
            if ranking is None:
                choice = self.policy.select(context)
            else:
                newest = entering.layout.visual == last_rows(entering.layout)
                choice = outcome(ranking.ahead(newest).index(context), ranking.positions)
            self._check(choice, context, entering.hidden)
        return carry_out(choice, entering)

    def _check(self, choice: Tensor | Reduction, context: TokenContext, hidden: Tensor) -> None:
        """Refuse a choice that means nothing. The first one at each layer is read in full: one host read."""
        layer = context.layer
        if layer not in self.checked and not hidden.is_meta:  # tensors without values have none to check
            check_selection(choice, context, repr(self.policy), hidden)
            self.checked.add(layer)
        if isinstance(choice, Reduction):
            self._check_positions(choice.positions)

    def _ranking(self, context: TokenContext) -> Ranking:
        """The policy's choice as data, refused in the same way."""
        ranking = self.policy.rank(context)
        if context.layer not in self.checked and context.device.type != "meta":
            check_ranking(ranking, context, repr(self.policy))
            self.checked.add(context.layer)
        self._check_positions(ranking.positions)
        return ranking

    def _check_positions(self, positions: Positions) -> None:
        if positions == "pack" and not self.parts.family.packs:
            raise ModelError(
                f"positions: expected 'keep' with {self.parts.config.model_type!r} (its positions have three "
                f"dimensions and cannot be packed), got 'pack' from {self.policy!r}"
            )

    def _context(self, prefill: Prefill, entering: Entering) -> TokenContext:
        """Everything the policy asked for, and where the visual tokens are; all of it where the rows are."""
        i, layout, hidden, unpruned = entering.layer, entering.layout, entering.hidden, prefill.unpruned
        assert unpruned is not None
        needs, text = prefill.wants.needs[i], unpruned.text
        attention = prefill.attention.pop(i, None)  # of the layer before, read when it ran
        if needs.attention == "own":
            layer = self.parts.layers[i]
            attention = read_own_attention(layer, hidden, entering.rope, layout, prefill, needs)
        seen: dict[str, Any] = {} if attention is None else {"attention": attention}
        if needs.vision:
            assert prefill.call.visuals is not None
            seen |= self.vision.fields(needs.vision, prefill.call.visuals, [*map(len, unpruned.images)])
        if needs.hidden:
            seen["hidden"] = ops.gather_tokens([hidden], layout.visual)[0]
        if needs.embeds:
            seen |= {"embeds": unpruned.embeds, "image": unpruned.layout.visual}
        if text is not None:
            seen |= {"text": text_rows(unpruned.layout, text), "words": text.words}
        device = hidden.device
        fields = {name: moved(value, device) for name, value in ({"vision": {}} | seen).items()}
        fields["layer"], fields["counts"], fields["ordered"] = i, layout.counts, layout.ordered
        fields["grids"], fields["sizes"], fields["shares"] = unpruned.grids, unpruned.sizes, unpruned.shares
        fields["device"] = device
        return StageContext(layout, **fields)


def _check_end(prefill: Prefill, first: Layout) -> None:
    """Raise ModelError where generation would go on from a padding row: once pruned, there is nothing in it."""
    if prefill.call.logits and first.trailing:
        raise ModelError(
            "attention_mask: expected padding on the left, as generation goes on from the last row "
            "(tokenizer.padding_side = 'left'), got a sample that ends in padding"
        )

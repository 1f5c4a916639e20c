"""What happens at one stage: show the policy its context, turn its choice into a decision, apply the decision."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import InputError, ModelError, check
from vlmprune.models.aside import brought_back, set_aside
from vlmprune.models.choice import Counts, apply, carry_out
from vlmprune.models.decoder_reads import read_own_attention
from vlmprune.models.fused import Case, Passed, Passes, why_not
from vlmprune.models.graphs.reads import HostRead
from vlmprune.models.host.parts import Parts, tokenizer_of
from vlmprune.models.layout import Layout, last_rows, moved
from vlmprune.models.prefill import Entering, Prefill, Rope
from vlmprune.models.standing import stood_for
from vlmprune.models.vision_reads import VisionReads
from vlmprune.policies.answer import check_ranking, check_selection
from vlmprune.policies.base import (
    AttentionInputs,
    Positions,
    PruningPolicy,
    Ranking,
    Reduction,
    TokenContext,
    outcome,
)
from vlmprune.policies.choose import quotas


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
        self.loaded: Any = None
        self.passes = Passes()

    def __call__(self, prefill: Prefill, i: int, hidden: Tensor, rope: Rope) -> Tensor:
        """Decide once which rows of ``hidden [B, n, D]`` survive into layer ``i``; apply it, again if that is replayed.

        ``rope`` has the tables of the unpruned chunk.
        """
        assert prefill.prompt is not None and prefill.unpruned is not None
        if i in prefill.decisions:
            made = prefill.decisions[i]
            return hidden if made is None else apply(made, hidden)
        entering, back = brought_back(prefill, prefill.entering(i, hidden, rope))
        path, new = f"one pass ({ops.backend_of('prune_tokens', hidden)})", i not in self.checked
        case = Case(entering, self._attention(prefill, entering), prefill.unpruned.facts, path)
        passed = self.passes.again(case)
        if passed is None:
            passed, path = self._asked(prefill, case)
        short, numbers, made = passed
        if made is not None:
            _check_end(prefill, entering.first)
            if new and prefill.wants.needs[i].wave and numbers is not None and not hidden.is_meta:
                self._check_stay(prefill, i, numbers)
            if self.policy.empties(i):
                _check_room(prefill, made.layout, self.policy)
            set_aside(prefill, entering, made, self.parts.layers[i])
            if self.policy.rectify:
                made = made._replace(weights=stood_for(entering, made, short, back or prefill.decision(i)))
            prefill.prompt.inserted = made.inserted or prefill.prompt.inserted
        layout = entering.layout
        prefill.prompt.record(i, layout, numbers, layout if made is None else made.layout, path)
        prefill.decisions[i] = made or back
        return short

    def _asked(self, prefill: Prefill, case: Case) -> tuple[Passed, str]:
        """Ask the policy, and carry out what it says: the rows that stay, and the path."""
        i, entering = case.entering.layer, case.entering
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            context = self._context(prefill, entering, case.seen)
            ranking = self._ranking(context) if self.policy.ranks(i) else None
        why = f"{type(self.policy).__name__} chooses by itself" if ranking is None else why_not(entering)
        if why is not None or ranking is None:
            return self._choose(context, entering, ranking), str(why)
        if ranking.keeps_all(entering.layout.counts):
            return (entering.hidden, None, None), case.path
        return self.passes(ranking, case), case.path

    def _choose(self, context: TokenContext, entering: Entering, ranking: Ranking | None) -> Passed:
        """Ask the policy for its choice, or take that of its ranking, as a pass would; carry it out."""
        first = context.layer not in self.checked
        with torch.no_grad():
            if ranking is None:
                choice = self.policy.select(context)
            else:
                newest = entering.layout.visual == last_rows(entering.layout)
                choice = outcome(ranking.ahead(newest).index(context), ranking.positions)
            self._check(choice, context, entering.hidden)
        counts = self._counts(context, entering)
        if counts is not None and first and counts != _counted(choice):
            raise HostRead(f"{type(self.policy).__name__} keeps another number than its `kept` says")
        return carry_out(choice, entering, counts, self.parts.text.rotary_emb)

    def _counts(self, context: TokenContext, entering: Entering) -> Counts | None:
        """How many tokens a choice keeps of each sample, as the policy promises; None where it is to be read."""
        if not entering.layout.bound:
            return None
        try:
            return tuple(quotas(context, self.policy))
        except InputError as unknown:
            raise HostRead("how many stay is known when they are chosen") from unknown

    def _check(self, choice: Tensor | Reduction, context: TokenContext, hidden: Tensor) -> None:
        """Refuse a choice that means nothing. The first one at each layer is read in full: one host read."""
        layer = context.layer
        if layer not in self.checked and not hidden.is_meta:  # tensors without values have none to check
            empties = self.policy.empties(layer)
            check_selection(choice, context, repr(self.policy), hidden, empties)
            self.checked.add(layer)
        if isinstance(choice, Reduction):
            self._check_positions(choice.positions)
            if choice.inserted is not None and not self.parts.family.packs:
                raise ModelError(
                    f"model: expected rotary positions of one dimension, which texts that join a prompt can move up, got "
                    f"{self.parts.config.model_type!r}"
                )

    def _ranking(self, context: TokenContext) -> Ranking:
        """The policy's choice as data, refused in the same way."""
        ranking = self.policy.rank(context)
        if context.layer not in self.checked and context.device.type != "meta":
            check_ranking(ranking, context, repr(self.policy), self.policy.empties(context.layer))
            self.checked.add(context.layer)
        self._check_positions(ranking.positions)
        return ranking

    def _check_stay(self, prefill: Prefill, i: int, numbers: Tensor) -> None:
        """Refuse a second wave without some token of the first, whose row has no place then: one host read."""
        before = prefill.layout(i - 1).before
        if before is not None and prefill.waves is not None:
            kept, ran = numbers.tolist(), before[1].tolist()
            for sample, (own, first) in enumerate(zip(kept, ran, strict=True)):
                gone = sorted(set(first) - set(own) - {-1})
                check(
                    not gone,
                    f"{self.policy!r}, sample {sample}",
                    "every token that has run to stay",
                    f"not {gone[:1]}",
                )

    def _check_positions(self, positions: Positions) -> None:
        if positions == "pack" and not self.parts.family.packs:
            raise ModelError(
                f"positions: expected 'keep' with {self.parts.config.model_type!r} (its positions have three "
                f"dimensions and cannot be packed), got 'pack' from {self.policy!r}"
            )

    def _attention(self, prefill: Prefill, entering: Entering) -> AttentionInputs | None:
        """What the policy scores from, where the rows are: of the layer before, read when it ran, or of the stage's own."""
        i, needs = entering.layer, prefill.wants.needs[entering.layer]
        if needs.attention == "own":
            layer, layout = self.parts.layers[i], entering.layout
            with torch.no_grad():
                return read_own_attention(layer, entering.hidden, entering.rope, layout, prefill, needs)
        seen = prefill.attention.pop(i, None)
        return None if seen is None else moved(seen, entering.hidden.device)

    def _context(
        self, prefill: Prefill, entering: Entering, attention: AttentionInputs | None
    ) -> TokenContext:
        """Everything the policy asked for, and where the visual tokens are; all of it where the rows are."""
        i, layout, hidden, unpruned = entering.layer, entering.layout, entering.hidden, prefill.unpruned
        assert unpruned is not None
        needs, text = prefill.wants.needs[i], unpruned.text
        seen: dict[str, Any] = {}
        if needs.vision:
            assert prefill.call.visuals is not None
            seen |= self.vision.fields(needs.vision, prefill.call.visuals, unpruned.seen)
        if needs.hidden:
            seen["hidden"] = ops.gather_tokens([hidden], layout.visual)[0]
        if needs.earlier:
            entered = prefill.earlier.pop(i)
            seen["earlier"] = ops.gather_tokens([entered], layout.visual.to(entered.device))[0]
        if needs.embeds:
            seen |= {"embeds": unpruned.embeds, "image": unpruned.layout.visual}
        if needs.wave and prefill.waves is not None:
            before = prefill.layout(i - 1)
            assert before.before is not None
            seen |= {"ran": before.before[1], "ran_counts": before.counts}
        if needs.tokens:
            seen["tokens"] = self._tokens(prefill)
        if needs.text:
            seen["text_hidden"] = ops.gather_tokens([hidden], unpruned.words_in(layout))[0]
            seen["start"] = unpruned.layout.start
        if text is not None:
            words = None if layout.bound else text.words  # of a graph's many prompts
            seen |= {"text": unpruned.words, "words": words}
        device = hidden.device
        fields = {name: moved(value, device) for name, value in ({"vision": {}} | seen).items()}
        fields["layer"], fields["counts"], fields["ordered"] = i, layout.counts, layout.ordered
        fields["attention"] = attention
        fields["grids"], fields["sizes"], fields["shares"] = unpruned.grids, unpruned.sizes, unpruned.shares
        fields["crops"] = unpruned.crops
        fields["device"], fields["shared"] = device, unpruned.shared
        if needs.tokens:
            fields["embed"], fields["tokenizer"] = self.parts.model.get_input_embeddings(), self.tokenizer
        if needs.text:
            fields["norm"] = self.norm
        return StageContext(layout, **fields)

    @staticmethod
    def _tokens(prefill: Prefill) -> Tensor:
        """``[B, q]`` ids of a prompt, -1 at padding and at candidates behind it."""
        assert prefill.unpruned is not None
        layout, ids = prefill.unpruned.layout, prefill.call.ids
        if layout.bound:
            raise HostRead("what the prompt says is read on the host")
        if ids is None:
            raise ModelError(
                "input_ids: expected them with a method that reads the prompt's words, got inputs_embeds"
            )
        inside = layout.prompt()
        return ids if inside is None else torch.where(inside.to(ids.device), ids, -1)

    def norm(self, states: Tensor) -> Tensor:
        """The text model's last norm, of states wherever they are."""
        normed: Tensor = self.parts.text.norm(states)
        return normed.to(states.device)

    def tokenizer(self) -> Any:
        """The one that was saved with the model, loaded once."""
        if self.loaded is None:
            self.loaded = tokenizer_of(self.parts.model)
        return self.loaded


def _counted(choice: Tensor | Reduction) -> Counts:
    """How many tokens of each sample a choice keeps. One host read."""
    index = choice.index if isinstance(choice, Reduction) else choice
    return tuple((index >= 0).sum(1).tolist())


def _check_end(prefill: Prefill, first: Layout) -> None:
    """Raise ModelError where generation would go on from a padding row: once pruned, there is nothing in it."""
    if prefill.call.logits and first.trailing:
        raise ModelError(
            "attention_mask: expected padding on the left, as generation goes on from the last row "
            "(tokenizer.padding_side = 'left'), got a sample that ends in padding"
        )


def _check_room(prefill: Prefill, after: Layout, policy: PruningPolicy) -> None:
    """Raise InputError where nothing is left of a prompt that ends with its image: the answer has no row to go on from."""
    assert prefill.unpruned is not None and prefill.unpruned.text is not None
    before, words = prefill.unpruned.layout.counts, prefill.unpruned.text.words
    lost = any(n and not text and not left for n, text, left in zip(before, words, after.counts, strict=True))
    room = "the last token of a prompt that ends with its image to stay"
    check(not (lost and prefill.call.logits), repr(policy), room, "none")

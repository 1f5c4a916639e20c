"""The masked run, which says what a pruned run should give: nothing is removed, the columns of dropped tokens are hidden.

It shares no code with the wiring: one forward without a cache over prompt and answer, an attention function of its own in
plain PyTorch, and hooks that hide columns (and move rows, where a policy moved them) from a stage's layer on. Hidden tokens
that enter a later stage are seen again, their rows as they were when they were hidden. Those that join in a second wave are
seen from layer 0 on; before its stage only by one another and by what stands behind the last image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_utils import AttentionInterface

from vlmprune.models import find_parts
from vlmprune.policies.base import Reduction
from vlmprune.testing.recorded import Answer, Second, Standing, as_reduction

NAME = "vlmprune_masked"
"""Its name among transformers' attention functions. Without a mask function of that name transformers makes no mask."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as a formula, in float32 or better. ``attention_mask [B, 1, S, S]`` is added: -inf = not seen."""
    exact = torch.promote_types(query.dtype, torch.float32)
    heads = query.shape[1] // key.shape[1]
    scores = (query.to(exact) * scaling) @ key.to(exact).repeat_interleave(heads, 1).mT
    weights = scores.add_(attention_mask).softmax(-1)
    out = weights @ value.to(exact).repeat_interleave(heads, 1)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, attention)


@torch.no_grad()
def masked_logits(
    model: Any,
    inputs: dict[str, Tensor],
    tokens: Tensor,
    answers: dict[int, Answer],
    compact: bool = False,
    standing: dict[int, Standing] | None = None,
) -> Tensor:
    """The logits of which greedy decoding chose ``tokens``, had it been pruned by ``answers``.

    Args:
        model: a supported vision-language model without hooks of ours. It is left as it was.
        inputs: of the prompt, padded on the left.
        tokens: ``[B, T]`` the answer that was given, whatever this run would have chosen.
        answers: what was chosen at each stage's layer; empty = nothing is hidden.
        compact: whether the answer's rows see the last stage's survivors only, also in earlier layers.
        standing: who stands for how many from each stage's layer on; None = every token for itself.

    Returns:
        ``[B, T, V]``, in the model's dtype.
    """
    said = tokens[:, :-1]
    inputs = {**inputs, "input_ids": torch.cat([inputs["input_ids"], said], 1)}
    inputs["attention_mask"] = pad(inputs["attention_mask"], (0, said.shape[1]), value=1)
    if "mm_token_type_ids" in inputs:  # such a model makes its own positions of three dimensions
        inputs["mm_token_type_ids"] = pad(inputs["mm_token_type_ids"], (0, said.shape[1]))
    else:
        inputs["position_ids"] = places(inputs["attention_mask"])
    text = find_parts(model).text
    answered = said.shape[1] if compact else 0
    state = _State(text, inputs["attention_mask"].bool(), answers, answered, standing or {})
    with _hooked(text, state):
        return model(**inputs, use_cache=False, logits_to_keep=tokens.shape[1]).logits


def places(real: Tensor) -> Tensor:
    """The number of each real token in its row, 0-based; 0 for padding before them."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


@contextmanager
def _hooked(text: Any, state: _State) -> Iterator[None]:
    """The text model with the attention function above, told by ``state`` what each layer sees."""
    usual = text.config._attn_implementation
    with ExitStack() as stack:
        stack.callback(text.register_forward_pre_hook(state.before_text, with_kwargs=True).remove)
        stack.callback(setattr, text.config, "_attn_implementation", usual)
        text.config._attn_implementation = NAME
        for layer in text.layers:
            handle = layer.register_forward_pre_hook(state.before_layer, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class _State:
    """What the rows of one masked run see, and where each token of the prompt now stands.

    Attributes:
        alive: ``[B, S]`` the columns that are seen from here on.
        place: ``[B, S]`` the column in which each token stands: stages may reorder those they keep.
        position: ``[B, S]`` rotary position of each column; used once a stage packed them.
        tables: ``[B, S]`` the column whose rotary tables each one has; used until then.
        answered: the last so many rows are an answer that sees the last stage's survivors only.
        standing: who stands for how many, by stage; ``latest``, from here on.
        features: what the text model adds to the visual columns behind its first layers, ``[M, D]`` each (Qwen3-VL).
        numbers: ``[B, S]`` which row of these a visual column gets.
        aside: by sample and position, the row of each token as it was when it was hidden.
        wave: the stage before which a second wave runs; -1 = none.
        late, behind: ``[B, S]`` the tokens that join in it, and the rows behind the last image.
    """

    def __init__(
        self,
        text: Any,
        real: Tensor,
        answers: dict[int, Answer],
        answered: int,
        standing: dict[int, Standing],
    ) -> None:
        self.text, self.answers, self.answered = text, answers, answered
        self.standing = standing
        self.latest: Standing = [{} for _ in real]
        self.alive, self.position, self.packed = real.clone(), places(real), False
        self.place = torch.arange(real.shape[1], device=real.device).repeat(len(real), 1)
        self.tables = self.place.clone()
        self.features: list[Tensor] = []
        self.given = self.features
        self.numbers = self.place
        self.aside: dict[tuple[int, int], Tensor] = {}
        self.wave, self.late = -1, torch.zeros_like(self.alive)
        self.behind = self.late
        for layer, answer in answers.items():
            if isinstance(answer, Second):
                self._join(layer, answer)

    def _join(self, layer: int, answer: Second) -> None:
        """What joins in a second wave is there from layer 0 on, hidden from others until ``layer``."""
        coarse, both = self._kept(self.answers[0]), self._kept(answer)
        self.wave, self.late = layer, both & ~coarse
        last = answer.entered.to(both.device).amax(1, keepdim=True)
        order = torch.arange(both.shape[1], device=both.device)
        self.behind = (order > last) & (last >= 0)
        later = {i: said for i, said in self.answers.items() if i > layer}
        self.answers = {0: (answer.entered, answer.answer), **later}

    def _kept(self, answer: Answer) -> Tensor:
        """``[B, S]`` True at the tokens that a stage keeps."""
        kept = torch.zeros_like(self.alive)
        for b, (entered, row) in enumerate(zip(answer[0], as_reduction(answer[1]).index, strict=True)):
            kept[b, entered[row[row >= 0]].to(kept.device)] = True
        return kept

    def before_text(self, text: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Keep hold of the features that the text model is about to add: they move with their tokens."""
        if kwargs.get("deepstack_visual_embeds") is None:
            return None
        visual = kwargs["visual_pos_masks"]
        self.given, self.features = kwargs["deepstack_visual_embeds"], [*kwargs["deepstack_visual_embeds"]]
        self.numbers = (visual.flatten().cumsum(0) - 1).view_as(visual).to(self.place.device)
        return args, {**kwargs, "deepstack_visual_embeds": self.features}

    def before_layer(self, layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hide, move and renumber what the stage at this layer did; then tell the layer what it sees."""
        hidden, i = args[0], layer.self_attn.layer_idx
        if i in self.answers:
            hidden = self._stage(self._back(hidden, self.answers[i][0]).clone(), *self.answers[i])
            self.latest = self.standing.get(i, self.latest)
        if self.packed:
            kwargs = {**kwargs, "position_embeddings": self.text.rotary_emb(hidden, self.position)}
        else:
            kwargs = {**kwargs, "position_embeddings": tuple(map(self._moved, kwargs["position_embeddings"]))}
        return (hidden, *args[1:]), {**kwargs, "attention_mask": self._seen(i).to(hidden.device)}

    def _moved(self, table: Tensor) -> Tensor:
        """Rows of ``[B or 1, S, D]`` where their tokens stand now."""
        at = self.tables.to(table.device)[..., None].expand(-1, -1, table.shape[2])
        return table.expand(len(at), -1, -1).gather(1, at)

    def _back(self, hidden: Tensor, entered: Tensor) -> Tensor:
        """If hidden tokens enter, every token is back in its own column, as it is or was when it was hidden."""
        found = [(b, p) for b, row in enumerate(entered.tolist()) for p in row if (b, p) in self.aside]
        if found:
            hidden = hidden.gather(1, self.place.to(hidden.device)[..., None].expand_as(hidden))
            for b, p in found:
                hidden[b, p], self.alive[b, p] = self.aside.pop((b, p)), True
            self.place.copy_(torch.arange(self.place.shape[1]))
            self.tables, self.packed, self.features[:] = self.place.clone(), False, self.given
        return hidden

    def _stage(self, hidden: Tensor, positions: Tensor, answer: Tensor | Reduction) -> Tensor:
        """The kept rows stand, in the order of the policy's answer, in the columns that the kept ones had."""
        change, device = as_reduction(answer), self.place.device
        before, numbers, tables = hidden.clone(), self.position.clone(), self.tables.clone()
        for b, (entered, row) in enumerate(zip(positions.to(device), change.index.to(device), strict=True)):
            entered, row = entered[entered >= 0], row[row >= 0]
            source = self.place[b, entered[row]]
            slots = source.sort().values
            for p in sorted({*entered.tolist()} - {*entered[row].tolist()}):
                self.aside[b, p] = hidden[b, self.place[b, p]].clone()
            self.alive[b, self.place[b, entered]] = False
            self.alive[b, slots] = True
            self.place[b, entered[row]] = slots
            self.position[b, slots] = numbers[b, source]
            self.tables[b, slots] = tables[b, source]
            new = before[b, source] if change.hidden is None else change.hidden[b, : len(row)]
            hidden[b, slots] = new.to(hidden.device)
            for i, rows in enumerate(self.features):
                moved = rows.clone()
                moved[self.numbers[b, slots]] = rows[self.numbers[b, source]]
                self.features[i] = moved
        if change.positions == "pack":
            self.position, self.packed = places(self.alive), True
        return hidden

    def _seen(self, i: int) -> Tensor:
        """``[B, 1, S, S]`` -inf = not seen in layer ``i``; rows that would see nothing (padding) see themselves."""
        length = self.alive.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.alive.device).tril()
        seen = causal & self.alive[:, None]
        if i < self.wave:
            seen = seen & ~(self.late[:, None] & ~(self.late | self.behind)[..., None])
        if self.answered:
            seen[:, -self.answered :] &= self._survivors()[:, None]
        seen |= causal & causal.mT & ~seen.any(-1, keepdim=True)
        more = self._more(self.latest)[:, None].repeat(1, length, 1)
        if self.answered and self.standing:
            more[:, -self.answered :] = self._more(self.standing[max(self.standing)])[:, None]
        return more.masked_fill(~seen, -torch.inf)[:, None]

    def _more(self, latest: Standing) -> Tensor:
        """``[B, S]`` float32 the log of how many tokens each column stands for."""
        more = torch.zeros(self.alive.shape, device=self.alive.device)
        for b, counts in enumerate(latest):
            for position, count in counts.items():
                more[b, self.place[b, position]] = log(count)
        return more

    def _survivors(self) -> Tensor:
        """``[B, S]`` False where a visual token stands that some stage will drop."""
        left, device = self.alive.clone(), self.place.device
        entered, last = self.answers[min(self.answers)][0].to(device), self.answers[max(self.answers)]
        kept, index = last[0].to(device), as_reduction(last[1]).index.to(device)
        for b, row in enumerate(index):
            left[b, self.place[b, entered[b, entered[b] >= 0]]] = False
            left[b, self.place[b, kept[b, row[row >= 0]]]] = True
        return left & self.alive

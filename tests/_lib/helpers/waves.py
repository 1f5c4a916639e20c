"""What two waves should give: the untouched model on the whole prompt, recomputed for every token under a 4-D mask.

With coarse and fine tokens kept at their own positions (columns of all others are hidden from everybody), a row sees the
column c from a position at or behind it, except that in layers 0..look-1 a fine column is only seen by fine rows, by rows
behind their sample's last visual token, and by later turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from helpers.tiny import IMAGE
from vlmprune import Scout, Uniform

COARSE = Uniform(layer=0, keep=4)
SCOUT = Scout(coarse=COARSE, fine=3, look=3, by="attention")
DEFAULT = Scout(coarse=COARSE, fine=3, look=3)
BOTH = {"attention": SCOUT, "default": DEFAULT}
PADDED = [["I", 9, "I", 4], [3, "I", 5], [12]]

Sets = list[tuple[set[int], set[int]]]
"""Per sample, the positions of its coarse tokens and of its fine ones."""


def sets_of(run: Any) -> Sets:
    """What a run says of both stages."""
    coarse, both = (stage.index.tolist() for stage in run.stages[:2])
    found = []
    for one, all_kept in zip(coarse, both, strict=True):
        some, kept = set(one) - {-1}, set(all_kept) - {-1}
        assert some <= kept
        found.append((some, kept - some))
    return found


def visible(visual: Tensor, real: Tensor, sets: Sets, early: bool, turns: Sequence[int] = ()) -> Tensor:
    """bool ``[B, S, S]`` by row and column, for visual tokens and real ones ``[B, S]``; ``turns`` are where further ones begin."""
    batch, length = real.shape
    seen = torch.zeros(batch, length, length, dtype=torch.bool)
    ends = [*turns, length]
    turn = [sum(p >= end for end in ends) for p in range(length)]
    for b, (coarse, fine) in enumerate(sets):
        columns = [p for p in range(length) if real[b, p] and (not visual[b, p] or p in coarse | fine)]
        last = {turn[p]: p for p in range(length) if visual[b, p]}
        for row in range(length):
            second = row in fine or row > last.get(turn[row], length)
            for column in columns:
                hidden = early and column in fine and turn[column] == turn[row] and not second
                seen[b, row, column] = column <= row and not hidden
            if not seen[b, row].any():
                seen[b, row, row] = True  # padding, and rows in front of everything that is kept
    return seen


@contextmanager
def waves_masked(
    model: Any,
    look: int,
    sets: Sets,
    visual: Tensor,
    real: Tensor,
    turns: Sequence[int] = (),
    dropped: tuple[int, Tensor] | None = None,
) -> Iterator[None]:
    """The model under these masks, without a cache; ``dropped``: a layer from which on columns ``[B, S]`` are hidden, too."""
    masks = {early: visible(visual, real, sets, early, turns)[:, None] for early in (True, False)}

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        mask = masks[module.self_attn.layer_idx < look]
        if dropped is not None and module.self_attn.layer_idx >= dropped[0]:
            mask = mask & ~dropped[1][:, None, None] | torch.eye(mask.shape[-1], dtype=torch.bool)
        floor = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": floor}

    layers = model.get_decoder().layers
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def waves_oracle(
    model: Any,
    inputs: dict[str, Tensor],
    look: int,
    sets: Sets,
    steps: int,
    placeholders: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """Greedy decoding by full recomputation: new tokens ``[B, steps]`` and their logits ``[B, steps, V]``."""
    inputs, tokens, logits = dict(inputs), [], []
    three = "mm_token_type_ids" in inputs  # such a model makes its own positions
    for _ in range(steps):
        real = inputs["attention_mask"]
        visual = torch.isin(inputs["input_ids"], torch.tensor(placeholders))
        places = {} if three else {"position_ids": (real.long().cumsum(-1) - 1).clamp(min=0)}
        with waves_masked(model, look, sets, visual, real.bool()):
            last = model(**inputs, **places, use_cache=False).logits[:, -1]
        choice = last.clone()
        choice[:, list(placeholders)] = float("-inf")
        tokens.append(choice.argmax(-1))
        logits.append(last)
        more = {"input_ids": tokens[-1][:, None], "attention_mask": torch.ones_like(real[:, :1])}
        more |= {"mm_token_type_ids": torch.zeros_like(real[:, :1]).int()} if three else {}
        inputs |= {name: torch.cat([inputs[name], new.to(inputs[name])], 1) for name, new in more.items()}
    return torch.stack(tokens, 1), torch.stack(logits, 1)


@torch.no_grad()
def teacher_forced(model, batch, sets, said, past=(), dropped=None):
    """The masked run's logits ``[B, T, V]`` from which ``said [B, T]`` was chosen."""
    ids = torch.cat([batch["input_ids"], said[:, :-1]], 1)
    real = torch.cat([batch["attention_mask"], torch.ones_like(said[:, :-1])], 1)
    places = (real.cumsum(-1) - 1).clamp(min=0)
    with waves_masked(model, SCOUT.look, sets, ids == IMAGE, real.bool(), past, dropped):
        given = {**batch, "input_ids": ids, "attention_mask": real, "position_ids": places}
        return model(**given, use_cache=False).logits[:, -said.shape[1] :]

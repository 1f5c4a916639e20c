"""A rival of captions that needs no training: kept keys stand for the dropped ones beside them (ERA's rectified logits).

Softmax over few keys gives each more weight than it had among many. Here a kept token that stands for m tokens, itself
included, has log m added to every attention logit it receives, in every layer, from every later token, as if it were there m times.
A dropped token is stood for by the kept one of its image whose projected feature is the closest by cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multiplicities(features: Tensor, kept: Tensor) -> Tensor:
    """How many of ``features [N, D]`` each of the places ``kept [K]`` stands for; ``[K]`` float32 that sum to N."""
    unit = F.normalize(features.float(), dim=1)
    closest = (unit @ unit[kept].T).argmax(dim=1)
    closest[kept] = torch.arange(len(kept), device=kept.device)
    return torch.bincount(closest, minlength=len(kept)).float()


@torch.inference_mode()
def answer_rectified(
    model: Any, inputs: Any, kept: Sequence[Sequence[int]], end: int, new_tokens: int, rectify: bool = True
) -> list[list[int]]:
    """Greedy answers to prompts of one image each, pruned before the language model with their positions kept.

    Args:
        model: a LLaVA of transformers with a Llama decoder and ``attn_implementation`` sdpa or eager.
        inputs: of its processor: ``input_ids`` padded on the left, ``attention_mask``, ``pixel_values``.
        kept: per sample the places kept of its visual tokens, ascending, as many in each sample.
        end: the token that ends an answer.
        new_tokens: of an answer, at most.
        rectify: False = no logits are changed: plain pruning.

    Returns:
        The tokens of each answer, its end left out.
    """
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    seen = torch.stack([*model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output])
    embeds, bias, positions, mask = [], [], [], []
    for row, own, features, places in zip(ids, real, seen, kept, strict=True):
        places = torch.tensor(places, device=row.device)
        visual = (row == model.config.image_token_id).nonzero()[:, 0]
        stays = torch.ones_like(own)
        stays[visual] = False
        stays[visual[places]] = True
        full = model.get_input_embeddings()(row)
        full[visual] = features.to(full.dtype)
        logs = torch.zeros(len(row), device=row.device)
        if rectify:
            logs[visual[places]] = multiplicities(features, places).log()
        embeds.append(full[stays])
        bias.append(logs[stays])
        positions.append((own.cumsum(0) - 1).clamp(min=0)[stays])
        mask.append(own[stays])
    return _decode(model, *map(torch.stack, (embeds, bias, positions, mask)), end, new_tokens)


def _decode(
    model: Any, embeds: Tensor, bias: Tensor, positions: Tensor, real: Tensor, end: int, new_tokens: int
) -> list[list[int]]:
    """The greedy loop, with ``bias [B, S]`` on the keys."""
    least = torch.finfo(embeds.dtype).min
    keys = bias.masked_fill(~real, least).to(embeds.dtype)  # [B, S]
    causal = torch.full((embeds.shape[1],) * 2, least, dtype=embeds.dtype, device=embeds.device).triu(1)
    mask = (causal + keys[:, None, :]).clamp(min=least)[:, None]
    answers: list[list[int]] = [[] for _ in embeds]
    open_rows, cache = set(range(len(embeds))), None
    for _ in range(new_tokens):
        out = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        token = model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)
        open_rows -= {row for row in open_rows if int(token[row]) == end}
        for row in open_rows:
            answers[row].append(int(token[row]))
        if not open_rows:
            break
        embeds, positions = model.get_input_embeddings()(token)[:, None], positions[:, -1:] + 1
        keys = torch.cat([keys, keys.new_zeros(len(keys), 1)], 1)
        mask = keys[:, None, None]
    return answers

"""The small model's answer: what it looked at meanwhile, and how sure it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.errors import ModelError, check
from vlmprune.guidance.scores import Guidance
from vlmprune.models import Run, prune
from vlmprune.models.watching import Watch
from vlmprune.policies.checks import check_whole
from vlmprune.policies.methods.sgl import SGL


@dataclass(frozen=True, eq=False)
class First:
    """What a small model said to a batch of prompts, and what it looked at meanwhile.

    Attributes:
        tokens: ``[B, T]`` int64, its greedy answers.
        spoken: ``[B, T]`` bool, False behind the token that ends an answer.
        confidence: ``[B]`` float32 in [0, 1], the geometric mean of its tokens' probabilities, the ending one included, behind
            what the model's ``generation_config`` does to logits (a repetition penalty).
        guidance: for ``SGL(guide=...)``.
        run: its prefill and decoding; reading the attention is part of their seconds.
    """

    tokens: Tensor
    spoken: Tensor
    confidence: Tensor
    guidance: Guidance
    run: Run


@torch.no_grad()
def answer_first(model: Any, inputs: Mapping[str, Any], max_new_tokens: int = 64) -> First:
    """Let a small model answer greedily, and sum what every layer's rows pay to the visual tokens meanwhile.

    Rows are those of the prompt from its last visual token on, and those of the answer but its last token, as in the
    released code; no attention matrix is made, whatever the model's ``attn_implementation``. It may be the model that
    is guided afterwards.

    Args:
        model: as for ``prune``, with no policy attached.
        inputs: of a processor: ids, mask, pixels; padded on the left.
        max_new_tokens: how long an answer may be, at least 1.

    Raises:
        ModelError: as ``prune``; a prompt padded on the right; a decoding that no hook sees (compiled as a whole).
        InputError: a policy is attached, a setting is out of range, or nothing says where visual tokens are.
    """
    check_whole("max_new_tokens", max_new_tokens, least=1)
    found = model.generation_config.eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    with Watch(model, ends) as watch:
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    received = watch.received()
    tokens = out.sequences[:, -len(out.scores) :]
    if received.steps != len(out.scores) - 1:
        raise ModelError(
            f"generate: expected {len(out.scores) - 1} steps that hooks see, got {received.steps}"
        )
    last = torch.isin(tokens, torch.tensor(ends, dtype=torch.int64, device=tokens.device)).long()
    spoken = last.cumsum(1) - last == 0
    logs = torch.stack([_logs(step, at) for step, at in zip(out.scores, tokens.unbind(1), strict=True)], 1)
    confidence = (logs.masked_fill(~spoken, 0).sum(1) / spoken.sum(1)).exp()
    guidance = Guidance(received.scores, received.grids, received.sizes)
    return First(tokens, spoken, confidence, guidance, watch.run)


def _logs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of ``tokens [...]`` by ``logits [..., V]``, float32."""
    logs = logits.float().log_softmax(-1)
    return logs.gather(-1, tokens.to(logs.device)[..., None])[..., 0]


@torch.no_grad()
def consistency(model: Any, inputs: Mapping[str, Any], first: First, keep: int | float = 0.05) -> Tensor:
    """``[B]`` float32 in [0, 1]: how probable its own answer is to a small model that sees few of the visual tokens.

    The product of the probabilities of all tokens of the answer, in one forward of prompt and answer in which the best
    tokens by its own guidance alone are left, before the first layer: as released, 5 % of them. The tower runs once more.

    Args:
        model, inputs, first: what ``answer_first`` was given, and gave.
        keep: what stays, a share or a number per image.
    """
    ids, (answers, steps) = inputs["input_ids"], first.tokens.shape
    check(len(ids) == answers, "first", f"an answer to each of {len(ids)} prompts", f"{answers} answers")
    rest = {name: _longer(x, ids, steps) for name, x in inputs.items()}
    mask = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids)
    rest["attention_mask"] = torch.cat([mask, first.spoken.to(mask)], 1)
    rest["input_ids"] = torch.cat([ids, first.tokens], 1)
    with prune(model, SGL(first.guidance, layer=0, keep=keep)):
        logits = model(**rest, logits_to_keep=steps + 1, use_cache=False).logits
    logs = _logs(logits[:, :-1], first.tokens)
    return logs.masked_fill(~first.spoken.to(logs.device), 0).sum(1).exp()


def _longer(x: Any, ids: Tensor, steps: int) -> Any:
    """An input that says something of each token (which are an image's, say), with zeros for an answer behind."""
    return pad(x, (0, steps)) if isinstance(x, Tensor) and x.shape == ids.shape else x

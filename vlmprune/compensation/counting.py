"""FLOPs (2 x multiply-accumulates) of transformers models by formula, without running them."""

from __future__ import annotations

from typing import Any

from torch import nn


def weights(model: nn.Module, without: tuple[nn.Module | None, ...] = ()) -> int:
    """Numbers in the matrices that every token passes through: all but tables of embeddings and ``without``."""
    parts = (
        m for m in model.modules() if not isinstance(m, nn.Embedding) and all(m is not w for w in without)
    )
    return sum(p.numel() for part in parts for p in part.parameters(recurse=False) if p.ndim == 2)


def attention_flops(config: Any, queries: int, keys: int) -> int:
    """Scores and values of all layers for one sequence, every query against every key (a causal kernel may do half)."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4 * queries * keys * width * config.num_hidden_layers


def generation_flops(language_model: Any, rows: int, prompt: int, steps: int) -> int:
    """What ``generate`` runs with a KV cache: a prefill of ``prompt`` tokens, then one token at a time.

    Args:
        language_model: a causal LM of transformers with dense layers (of experts, all would be counted as run).
        rows: sequences, beams times prompts, as the prefill is run for each beam.
        prompt: tokens of the longest prompt, padding included.
        steps: tokens written, the first by the prefill.
    """
    config = language_model.config.get_text_config()
    head = language_model.get_output_embeddings()
    token = 2 * weights(language_model, (head,))
    seen = attention_flops(config, prompt, prompt)
    seen += sum(attention_flops(config, 1, prompt + step) for step in range(1, steps))
    return rows * (token * (prompt + steps - 1) + seen + 2 * head.weight.numel() * steps)

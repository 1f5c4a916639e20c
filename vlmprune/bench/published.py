"""The published style of pruning, to compare with: how FastV's released code drops tokens (arXiv 2403.06764).

Every layer runs eager attention, which writes the whole matrix of weights; the mean over the heads of its last row scores
the visual tokens; top-k, and boolean indexing of hidden states, tables and mask, which waits for the device. Layers behind
the stage keep a shorter cache. Nothing of ours is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vlmprune.models.host.parts import Parts, find_parts


@contextmanager
def published_style(model: Any, stages: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Prune in this style inside the block.

    Args:
        model: a supported model; the prompts of a batch have equally many visual tokens and no padding.
        stages: layer (at least 1) and how many visual tokens of each sample stay from there on.
    """
    parts = find_parts(model)
    style = _Style(parts, dict(stages))
    before = parts.text.config._attn_implementation
    handles = [parts.base.register_forward_pre_hook(style.see_prompt, with_kwargs=True)]
    for i, layer in enumerate(parts.layers):
        if i + 1 in style.keep:
            handles.append(layer.self_attn.register_forward_hook(style.see_weights))
        handles.append(layer.register_forward_pre_hook(style.before_layer(i), with_kwargs=True))
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})
        for handle in handles:
            handle.remove()


class _Style:
    """The hooks of one block, and what they know of the running forward."""

    def __init__(self, parts: Parts, keep: dict[int, int]) -> None:
        self.parts, self.keep = parts, keep
        self.visual: Tensor | None = None  # [B, n] bool, where the visual tokens stand now
        self.weights: Tensor | None = None  # [B, H, n, n] of the latest layer before a stage
        self.short: dict[str, Any] = {}

    def see_prompt(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward begins: of a prompt, where its visual tokens stand; a decode step is one token."""
        ids = self.parts.host.arguments(args, kwargs).ids
        assert ids is not None  # generate() has them
        self.visual = ids == self.parts.token_ids["image"] if ids.shape[1] > 1 else None
        self.short = {}

    def see_weights(self, module: Any, args: Any, output: Any) -> None:
        """The matrix of attention weights, which eager attention returns."""
        self.weights = output[1]

    def before_layer(self, i: int) -> Any:
        """The hook of layer ``i``: drop rows at a stage, and give later layers the tables of those that stay."""

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if self.visual is None:  # a decode step: all that is cached is seen
                return args, kwargs | {"attention_mask": None}
            if i not in self.keep:
                return args, kwargs | self.short
            assert self.weights is not None
            scores = self.weights.mean(1)[:, -1].masked_fill(~self.visual, -1)
            kept = ~self.visual
            kept.scatter_(1, scores.topk(self.keep[i]).indices, True)
            return (self._dropped(args[0], kept, kwargs | self.short), *args[1:]), kwargs | self.short

        return hook

    def _dropped(self, hidden: Tensor, kept: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Boolean indexing of everything that gets shorter."""
        assert self.visual is not None
        batch = len(kept)

        def rows(x: Tensor) -> Tensor:
            return x[kept].view(batch, -1, x.shape[-1])

        tables = tuple(rows(t.expand(batch, -1, -1)) for t in kwargs["position_embeddings"])
        mask = kwargs["attention_mask"]
        if mask is not None:
            every = mask.expand(batch, 1, -1, mask.shape[-1])
            pairs = kept[:, :, None] & kept[:, None]
            n = int(kept[0].sum())
            mask = every[:, 0][pairs].view(batch, 1, n, n)
        self.short = {"position_embeddings": tables, "attention_mask": mask, "position_ids": None}
        self.visual = self.visual[kept].view(batch, -1)
        return rows(hidden)


def why_not_published(layers: Sequence[int]) -> str | None:
    """Why this style cannot prune at these layers; None if it can."""
    if 0 in layers:
        return "the published style scores from the attention of the layer before, and layer 0 has none"
    return None

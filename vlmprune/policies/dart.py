"""DART: a few pivot tokens, and around each the visual tokens that duplicate it least. No attention is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune import ops
from vlmprune.constants import whole_numbers
from vlmprune.errors import check, require
from vlmprune.ops.reference import unrotate
from vlmprune.policies.base import AttentionInputs, Needs, PruningPolicy, TokenContext, attention_of
from vlmprune.policies.checks import check_keep, check_layer, check_word
from vlmprune.policies.choose import select_counts
from vlmprune.policies.counts import keep_count


@dataclass(frozen=True)
class DART(PruningPolicy):
    """Keeps pivots and the tokens least like them: each pivot in turn takes the free tokens of lowest cosine to it.

    Pivots are the visual tokens, and the text tokens after the last image, with the largest L1 norm of the previous
    layer's keys (all heads, after RoPE). Text pivots choose but are no visual tokens.

    Readings. The released code walks the pivots in the order of a Python set; here visual pivots come first, then text
    pivots, each by position. It compares final-normed hidden states. Here visual pivots compare hidden states without
    the final norm's weights, and text pivots, whose hidden states a context does not carry, the previous layer's keys
    without RoPE. What a missing text pivot would have taken goes to the tokens of largest key norm; so without text
    after the image the visual pivots and the key norms decide. A sample keeps at least one token.

    Args:
        layer: layers 0..layer-1 see every token, ``layer`` and later only the kept ones; at least 1.
        keep: share (float) of the visual tokens, or visual tokens per image (int).
        pivots: visual and text pivots per sample.
        count: ``"released"``: every pivot takes ``keep // all pivots``, on top of the visual pivots themselves (128
            becomes 132); ``"exact"``: exactly ``keep``, pivots included, shared out evenly, the first taking the rest.
    """

    summary = "tokens that duplicate a few pivots least, without attention"
    paper = 'Stop Looking for "Important Tokens" in Multimodal Language Models: Duplication Matters More, arXiv 2502.11494'
    presets = {
        192: "layer=2,keep=166,count=exact",
        128: "layer=2,keep=98,count=exact",
        64: "layer=2,keep=30,count=exact",
        640: "layer=2,keep=490,count=exact",
        320: "layer=2,keep=149,count=exact",  # two full layers alone are a mean of 180
        0.333: "layer=2,keep=0.2816,count=exact",
        0.222: "layer=2,keep=0.1621,count=exact",
        0.111: "layer=2,keep=0.0426,count=exact",
    }
    checked = "reading"
    growth = "n"  # a few pivots, each compared with all

    layer: int = 2
    keep: int | float = 128
    pivots: tuple[int, int] = (4, 4)
    count: Literal["released", "exact"] = "released"

    def __post_init__(self) -> None:
        check_layer(self.layer, 1, " (the keys come from the layer before)")
        check_keep(self.keep)
        two = isinstance(self.pivots, tuple) and len(self.pivots) == 2
        ok = two and all(isinstance(p, int) and p >= 0 for p in self.pivots) and sum(self.pivots) > 0
        check(ok, "pivots", "a number of visual and one of text pivots, not both 0", repr(self.pivots))
        check_word("count", self.count, "released", "exact")

    def needs(self, layer: int) -> Needs:
        """The visual tokens' hidden states; the previous layer's keys, and which of them are text."""
        return Needs(hidden=True, attention="previous", rows="text", keys_only=True)

    def select(self, ctx: TokenContext) -> Tensor:
        """Pivots first, then what each takes, in as many rounds as there are pivots; no host sync."""
        if ctx.mask.shape[1] == 0:
            return ctx.ordinals
        seen = attention_of(ctx).chunk()
        strength = torch.linalg.vector_norm(seen.key, 1, dim=(1, 3), dtype=torch.float32)  # [B, S]
        norms, words = (ops.gather_tokens([strength], at)[0] for at in (seen.columns, seen.rows))
        shared = [self._shared(n, images) for n, images in zip(ctx.counts, ctx.image_counts(), strict=True)]
        visual = select_counts(norms, ctx, [first for first, _, _ in shared])
        most = min(self.pivots[1], words.shape[1])
        absent = torch.where(seen.rows >= 0, 0, 2).to(torch.int8)
        text = ops.select_topk(words, most, code=absent)[0][:, :most]
        shares = whole_numbers(tuple(tuple(share) for _, share, _ in shared), norms.device)
        shares = torch.cat([shares[:, : visual.shape[1]], shares[:, self.pivots[0] :][:, :most]], 1)
        shares = shares * (torch.cat([visual, text], 1) >= 0)  # a pivot that is not there takes nothing
        unlike = torch.cat([_hidden_cosines(ctx, visual), _key_cosines(seen, text)], 1).neg_()
        code = self._taken(unlike, shares, visual, ctx.mask)
        total = tuple(kept for _, _, kept in shared)
        rest = whole_numbers(total, norms.device) - (code == 1).sum(1)
        return ops.select_topk(norms, rest, code=code)[0][:, : max(total)]

    @staticmethod
    def _taken(unlike: Tensor, shares: Tensor, visual: Tensor, mask: Tensor) -> Tensor:
        """Code ``[B, N]`` for ``select_topk``: 1 for the visual pivots and each pivot's share of ``unlike [B, pivots, N]``."""
        free = torch.where(mask, 0, 2).to(torch.int8)
        code = torch.cat([free, free[:, :1]], 1)  # one place more takes what is padding
        N, chosen = mask.shape[1], visual
        for values, share in zip(unlike.unbind(1), shares.unbind(1), strict=True):
            code.scatter_(1, torch.where(chosen < 0, N, chosen), 1)
            chosen = ops.select_topk(values, share, code=code[:, :N])[0]
        return code.scatter_(1, torch.where(chosen < 0, N, chosen), 1)[:, :N]

    def kept(self, tokens: int, images: float, layer: int) -> int:
        """With "released" up to the visual pivots more than ``keep``, or up to one less for each pivot."""
        return self._shared(tokens, images)[2] if tokens else 0

    def _shared(self, tokens: int, images: float) -> tuple[int, list[int], int]:
        """Of one sample: how many visual pivots, how many tokens each pivot takes, how many tokens that makes."""
        keep, pivots = keep_count(self.keep, tokens, images), sum(self.pivots)
        if self.count == "released":
            first, share = min(self.pivots[0], tokens), keep // pivots
            return first, [share] * pivots, min(tokens, max(1, first + share * pivots))
        first = min(self.pivots[0], keep)
        share, extra = divmod(keep - first, pivots)
        return first, [share + (i < extra) for i in range(pivots)], keep


def _hidden_cosines(ctx: TokenContext, pivots: Tensor) -> Tensor:
    """Cosines ``[B, pivots, N]`` of hidden states; for a pivot of -1 zeros."""
    hidden = require(ctx.hidden, "ctx.hidden", "hidden states (declare Needs(hidden=True))")
    unit = normalize(hidden.float(), dim=-1)
    return ops.gather_tokens([unit], pivots)[0] @ unit.transpose(1, 2)


def _key_cosines(seen: AttentionInputs, pivots: Tensor) -> Tensor:
    """Cosines ``[B, pivots, N]`` of text keys (numbers among ``seen.rows``) and visual keys, all heads, without RoPE."""
    rows = torch.where(pivots >= 0, seen.rows.gather(1, pivots.clamp(min=0)), -1)
    units = []
    for at in (rows, seen.columns):
        key, cos, sin = ops.gather_tokens([seen.key, *seen.rope], at)
        units.append(normalize(unrotate(key, cos, sin).transpose(1, 2).flatten(2), dim=-1))  # NaN for padding
    return units[0] @ units[1].transpose(1, 2)

"""SparseVLM's text raters: the words of the prompt that the image calls up, and the attention they pay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune import ops
from vlmprune.errors import require
from vlmprune.policies.base import AttentionInputs, TokenContext


def image_positions(ctx: TokenContext) -> Tensor:
    """Positions ``[B, N0]`` in the prompt chunk of every visual token before any pruning, -1 = padding.

    The tokens of one image stand together, so one survivor gives away where its whole image was. An image without
    survivors is missing here.
    """
    sizes = [torch.tensor([rows * cols for rows, cols in grids], dtype=torch.int64) for grids in ctx.grids]
    spare = max(map(len, sizes), default=0)  # the number of an image that is not there
    images = [torch.repeat_interleave(size) for size in sizes]
    image = pad_sequence(images, batch_first=True, padding_value=spare).to(ctx.mask.device, non_blocking=True)
    if image.shape[1] == 0:
        return image
    here = torch.where(ctx.mask, image.gather(1, ctx.ordinals.clamp(min=0)), spare)
    shift = torch.full((len(sizes), spare + 1), -1, dtype=torch.int64, device=image.device)
    shift.scatter_(1, here, ctx.positions - ctx.ordinals)[:, spare] = -1
    known = shift.gather(1, image)
    return torch.where(known >= 0, known + torch.arange(image.shape[1], device=image.device), -1)


def rater_weights(ctx: TokenContext) -> Tensor:
    """1 for every text row that is a rater, else 0: ``[B, T]`` float32, in the order of ``ctx.text``.

    ``r = mean_j softmax_over_text(H_v H_q^T)[j]`` from the input embeddings of all visual tokens and of the text after
    the last image; raters are the rows with ``r > mean(r)``, and all rows where none is above (equal ones).
    """
    embeds = require(ctx.embeds, "ctx.embeds", "input embeddings (declare Needs(embeds=True))")
    text = require(ctx.text, "ctx.text", "positions of the text (declare Needs(embeds=True))")
    at = image_positions(ctx)
    visual, words = (ops.gather_tokens([embeds], index)[0].float() for index in (at, text))
    real, seen = (text >= 0), (at >= 0).float()
    pull = (visual @ words.transpose(1, 2)).masked_fill(~real[:, None, :], float("-inf")).softmax(-1)
    r = torch.where(real, (pull * seen[..., None]).sum(1), 0.0) / seen.sum(1, keepdim=True).clamp(min=1)
    mean = r.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
    above = (r > mean) & real
    return torch.where(above.any(1, keepdim=True), above, real).float()


def row_attention(seen: AttentionInputs) -> Tensor:
    """Attention of every listed row to every visual column ``[B, H, R, N]`` float32; padding is 0.

    For the few rows and columns of a text and an image, where a method needs them one by one.
    """
    (B, H, Sq, D), (S, heads) = seen.query.shape, (seen.key.shape[2], seen.key.shape[1])
    lse = ops.row_lse(seen.query, seen.key, seen.rows, key_mask=seen.key_mask, scale=seen.scale)
    at = torch.where(seen.rows >= 0, seen.rows - (S - Sq), -1)
    query, key = (
        ops.gather_tokens([x], i)[0].float() for x, i in ((seen.query, at), (seen.key, seen.columns))
    )
    shared = query.view(B, heads, H // heads, at.shape[1], D)  # query heads that share a key head
    logits = torch.einsum("bghrd,bgnd->bghrn", shared, key).flatten(1, 2) * seen.scale
    real = (seen.rows >= 0)[:, None, :, None] & (seen.columns >= 0)[:, None, None, :]
    return (logits - lse[..., None]).masked_fill(~real, float("-inf")).exp()

"""One image's choice: the context a policy is shown of it, and the rows that stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import check
from vlmprune.models.host.cells import crops_of
from vlmprune.models.host.views import ImageViews
from vlmprune.policies.base import Grid, PruningPolicy, Reduction, TokenContext, outcome, tokens_in


def context_of(rows: Tensor, image: ImageViews, patches: Grid | None, seen: dict[str, Any]) -> TokenContext:
    """A prompt of one image alone.

    Args:
        rows: ``[n, D]`` its visual tokens.
        image: their grids.
        patches: rows and columns of a crop in patches, where images are cut into tiles.
        seen: the fields that come from the vision tower.
    """
    n = len(rows)
    places = torch.arange(n, device=rows.device)[None]
    return TokenContext(
        layer=0,
        mask=torch.ones(1, n, dtype=torch.bool, device=rows.device),
        counts=(n,),
        ordinals=places,
        positions=places,
        grids=(tuple(view.grid for view in image if tokens_in([view.grid])),),
        hidden=rows[None],
        sizes=((n,),),
        crops=None if patches is None else (crops_of((image,), patches),),
        **seen,
    )


def kept_rows(policy: PruningPolicy, ctx: TokenContext, embeds: Tensor, kept: int) -> Tensor:
    """The rows ``[kept, W]`` of ``embeds [n, W]`` that stay; of tokens that merge the first D columns are made anew.

    Raises:
        InputError: a choice of another size.
    """
    if policy.ranks(0):
        ranking = policy.rank(ctx)
        choice = outcome(ranking.index(ctx), ranking.positions)
    else:
        choice = policy.select(ctx)
    index = choice.index if isinstance(choice, Reduction) else choice
    check(index.shape == (1, kept), repr(policy), f"{kept} tokens of one image", tuple(index.shape))
    (rows,) = ops.gather_tokens([embeds[None]], index)
    if isinstance(choice, Reduction) and choice.hidden is not None:
        made = choice.hidden.to(rows)
        rows = torch.cat([made, rows[..., made.shape[2] :]], -1)
    return rows[0]

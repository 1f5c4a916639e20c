"""What a policy reads of the model: declared as ``Needs``; query and key of a decoder layer and of a vision layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar, Unpack

import torch
from torch import Tensor
from torch import distributed as dist

from vlmprune import ops
from vlmprune.errors import check
from vlmprune.ops.reference import join_heads
from vlmprune.ops.scoring import ReductionKeywords, Scoring

Grid = tuple[int, int]
"""Rows and columns of visual tokens: those of one image, of a video's frame, or of an image's small view or tiles."""


def tokens_in(grids: Iterable[Grid]) -> int:
    """Visual tokens of all these grids."""
    return sum(rows * columns for rows, columns in grids)


@dataclass(frozen=True)
class Needs:
    """What a policy reads besides the layout of the tokens; the wiring computes nothing else.

    Args:
        hidden: the visual tokens' hidden states entering the stage.
        attention: query and key of the layer before the stage ("previous"), of the stage's own layer, projected from
            what enters it ("own"), or None.
        rows: which query rows: the last prompt row ("last"), the text after the last image ("text", one host read a
            prefill), or every prompt row ("all").
        embeds: the input embeddings of the whole prompt, and where its text is (one host read a prefill).
        vision: vision-tower layers whose query and key to read (-2 = the last but one); with any, also the features.
        values: whether the values of these vision layers are read, too.
        keys_only: whether of that attention only the keys, and where the rows are, are read: then no query is projected.
        tokens: the prompt's token ids, the table that embeds them, and the tokenizer; such a stage is the first one.
        text: the hidden states entering the stage of the text after the last image (one host read a prefill), where the
            prompt begins, and the text model's last norm.
        restored: whether every visual token enters, also those that earlier stages have set aside: in their places and at
            their positions, with the hidden states with which they left. Beside it ``attention`` is "own" or None: the
            layer before knows nothing of them.
        wave: whether those of them that stay run through the layers before this one first, and with them the text behind
            the last image once more, over what these layers hold of all others (``models/waves.py``). The stage before is
            at layer 0, and all that it left stays. Beside it ``restored`` is True; ``attention`` may be "previous", of the
            tokens that have run (``TokenContext.ran``).
        earlier: the hidden states with which the same tokens entered the layer before; False where tokens are restored, and at
            layer 0.
    """

    hidden: bool = False
    attention: Literal["previous", "own"] | None = None
    rows: Literal["last", "text", "all"] = "last"
    embeds: bool = False
    vision: tuple[int, ...] = ()
    keys_only: bool = False
    tokens: bool = False
    text: bool = False
    restored: bool = False
    wave: bool = False
    earlier: bool = False
    values: bool = False

    def __post_init__(self) -> None:
        check(self.restored or not self.wave, "wave", "False where no token is restored", self.wave)
        known = self.wave or not (self.restored and self.attention == "previous")
        check(known, "attention", "'own' or None where tokens are restored", repr(self.attention))
        check(
            not (self.restored and self.earlier), "earlier", "False where tokens are restored", self.earlier
        )
        check(bool(self.vision) or not self.values, "values", "False without vision layers", self.values)

    @property
    def reads_text(self) -> bool:
        """Whether the text after the last image must be found, for its rows, states or embeddings, or to run again."""
        return self.embeds or self.text or self.wave or self.rows == "text"

    def __or__(self, other: Needs) -> Needs:
        """The needs of two policies that act at one layer. Raises ValueError where they cannot both be met."""
        reading = [need for need in (self, other) if need.attention is not None]
        return Needs(
            hidden=self.hidden or other.hidden,
            attention=_either("attention", self.attention, other.attention, None),
            rows=_either("rows", self.rows, other.rows, "last"),
            embeds=self.embeds or other.embeds,
            vision=tuple(sorted({*self.vision, *other.vision})),
            keys_only=bool(reading) and all(need.keys_only for need in reading),
            tokens=self.tokens or other.tokens,
            text=self.text or other.text,
            restored=self.restored or other.restored,
            wave=self.wave or other.wave,
            earlier=self.earlier or other.earlier,
            values=self.values or other.values,
        )


T = TypeVar("T")


def _either(name: str, one: T, other: T, weakest: T) -> T:
    """The stronger of two needs; two different ones above the weakest exclude each other."""
    clash = one != other and weakest not in (one, other)
    check(not clash, name, "policies at one layer that read the same", f"{one!r} and {other!r}")
    return other if one == weakest else one


@dataclass(frozen=True)
class AttentionInputs:
    """Query rows and keys of one layer, ready for ``ops.received_attention``. S = cached past + this prompt chunk.

    Attributes:
        query: ``[B, H, Sq, D]`` after RoPE; covers the last Sq of the S positions (Sq is 1 when only the last row is needed,
            0 for ``Needs.keys_only``).
        key: ``[B, Hkv, S, D]`` after RoPE.
        last: ``[B, 1]`` int64, key position of the last prompt row.
        rows: ``[B, R]`` int64, key positions of the rows asked for (``Needs.rows``), -1 = padding.
        columns: ``[B, N]`` int64, key positions of the visual tokens entering the stage, -1 = padding.
        key_mask: ``[B, S]`` bool, False = padding; None = no padding.
        rope: ``(cos, sin)``, each ``[B or 1, Q, D]``, of the last Q positions: this prompt chunk.
        scale: softmax scale.
        lse: ``[B, H, Sq]`` float32 natural log-sum-exp of the query's rows over all keys they see, from the attention
            kernel that ran the layer; None = scoring computes what it needs.
        group: the torch.distributed process group whose ranks hold equal shares of the heads; None = all are here.
    """

    query: Tensor
    key: Tensor
    last: Tensor
    rows: Tensor
    columns: Tensor
    key_mask: Tensor | None
    rope: tuple[Tensor, Tensor]
    scale: float
    lse: Tensor | None = None
    group: Any = None

    def rating(
        self, rows: Tensor | None = None, *, unrotated: bool = False, **reduction: Unpack[ReductionKeywords]
    ) -> Rating:
        """The attention that the visual columns receive, not computed yet: what a ``Ranking`` goes by.

        Args:
            rows: key positions ``[B, R]`` to read, -1 = padding; None = ``self.rows``.
            unrotated: score without RoPE; only without a cached past (``chunk``), whose tables are not here.
            reduction: ``row_weight``, ``pair_weight``, ``head_reduce``, ``top_heads``, ``row_reduce``, ``normalize``, as in
                ``ops.received_attention``.
        """
        rotated_shares = reduction.get("normalize", "row") == "row" and not unrotated
        cos, sin = self.rope if unrotated else (None, None)
        scoring = Scoring(
            self.query,
            self.key,
            self.rows if rows is None else rows,
            self.columns,
            self.scale,
            self.key_mask,
            lse=self.lse if rotated_shares else None,
            cos=cos,
            sin=sin,
            **reduction,
        )
        return Rating(scoring, self.group)

    def received(
        self, rows: Tensor | None = None, *, unrotated: bool = False, **reduction: Unpack[ReductionKeywords]
    ) -> Tensor:
        """Attention that the visual columns receive: ``ops.received_attention`` over the heads of all ranks.

        Args:
            rows, unrotated, reduction: as for ``rating``.

        Returns:
            ``[B, N]`` float32, or ``[B, H, N]`` for head_reduce "none"; H then counts the heads of all ranks.
        """
        return self.rating(rows, unrotated=unrotated, **reduction).scores()

    def across_ranks(self, x: Tensor, head_reduce: str) -> Tensor:
        """Join what each rank made of its own heads, ``[B, ...]``, or ``[B, H, ...]`` for head_reduce "none"."""
        return _joined(x, head_reduce, self.group)

    def chunk(self) -> AttentionInputs:
        """The same without the cached past: keys, masks and positions of this prompt chunk only."""
        past = self.key.shape[2] - self.rope[0].shape[1]
        if past == 0:
            return self
        mask = None if self.key_mask is None else self.key_mask[:, past:]
        last, rows, columns = (torch.where(t >= 0, t - past, t) for t in (self.last, self.rows, self.columns))
        return replace(
            self,
            key=self.key[:, :, past:],
            last=last,
            rows=rows,
            columns=columns,
            key_mask=mask,
            lse=None,  # it counts the past's keys too
        )


def _joined(x: Tensor, head_reduce: str, group: Any) -> Tensor:
    """What each rank of a group (None = there is one) made of its own heads."""
    if group is None:
        return x
    if head_reduce == "none":
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1)
    x = x.contiguous()
    dist.all_reduce(x, op=dist.ReduceOp.MAX if head_reduce == "max" else dist.ReduceOp.SUM, group=group)
    return x / group.size() if head_reduce == "mean" else x


class Rating(NamedTuple):
    """Which attention rates the visual tokens: ``ops.received_attention`` of this scoring.

    Attributes:
        scoring: one column for each token.
        group: whose ranks hold equal shares of the heads; None = all are here.
        apart: whether query and key are not of the decoder's rows but of others, such as a vision tower's patches.
    """

    scoring: Scoring
    group: Any = None
    apart: bool = False

    def scores(self) -> Tensor:
        """``[B, N]`` float32, or ``[B, H, N]`` for head_reduce "none"."""
        how, top, reduce = self.scoring.keywords(), self.scoring.top_heads, self.scoring.head_reduce
        if self.group is None or top is None or reduce == "none":
            return _joined(ops.received_attention(**how), reduce, self.group)
        # The best heads of all ranks: which they are is not known until all are together.
        check(isinstance(top, int) and top >= 1, "top_heads", "a whole number >= 1", repr(top))
        how |= {"head_reduce": "none", "top_heads": None}
        return join_heads(_joined(ops.received_attention(**how), "none", self.group), reduce, top)

"""What a policy is: settings in, kept visual tokens out. No model, no cache, no transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.errors import check, require
from vlmprune.policies.attention import AttentionInputs as AttentionInputs
from vlmprune.policies.needs import Needs as Needs

Grid = tuple[int, int]
"""Rows and columns of visual tokens: those of one image, of a video's frame, or of an image's small view or tiles."""


def tokens_in(grids: Iterable[Grid]) -> int:
    """Visual tokens of all these grids."""
    return sum(rows * columns for rows, columns in grids)


@dataclass(frozen=True)
class VisionAttention:
    """Query and key of one vision-tower layer, for the I images of a call in prompt order.

    Attributes:
        query, key: ``[I, H, P, D]``, or ``[I, H, 1 + P, D]`` with the CLS row first.
        scale: softmax scale.
        cls: whether row 0 is a CLS token.
        grid: patch rows and columns, where ``side`` is not 1.
        side: rows and columns of the block of patches that became one visual token.
        mask: ``[I, P]`` bool, False at patches that are padding (no CLS then); None = none are.
    """

    query: Tensor
    key: Tensor
    scale: float
    cls: bool
    grid: Grid | None = None
    side: int = 1
    mask: Tensor | None = None

    def per_token(self, patches: Tensor) -> Tensor:
        """Mean over each visual token's block: ``[I, P, ...]`` to ``[I, P / side^2, ...]``."""
        if self.side == 1:
            return patches
        rows, columns = require(self.grid, "grid", "patch rows and columns")
        down, across = rows // self.side, columns // self.side
        blocks = patches.reshape(len(patches), down, self.side, across, self.side, *patches.shape[2:])
        return blocks.float().mean((2, 4)).flatten(1, 2)


@dataclass(frozen=True)
class TokenContext:
    """What a policy may look at: the visual tokens that enter a stage, in prompt order, padded on the right.

    Attributes:
        layer: the stage's decoder layer.
        mask: ``[B, N]`` bool, False = padding (samples with fewer visual tokens).
        counts: visual tokens of each sample, host ints (``mask.sum(1)``).
        ordinals: ``[B, N]`` int64, each token's number among the prompt's visual tokens before any pruning, -1 = padding.
        positions: ``[B, N]`` int64, each token's position in the prompt chunk before any pruning, -1 = padding.
        grids: per sample, the grids of its visual tokens in prompt order (their products add up to the unpruned count):
            one per image, or several where an image has a small view and tiles, or a video has frames. A newline token
            ends its row of the grid, or is a grid of its own.
        hidden: ``[B, N, D]`` hidden states entering the stage, zeros at padding, or None if not asked for.
        attention: query and key of one layer, or None if not asked for.
        embeds: ``[B, q, D]`` input embeddings of the whole prompt chunk, or None if not asked for.
        image: ``[B, N0]`` int64 positions in the prompt chunk of all its visual tokens, before any pruning, -1 = padding;
            given with ``embeds``.
        text: ``[B, T]`` int64 positions in the prompt chunk of the text after the last image, -1 = padding; given with
            ``embeds`` or text rows. A prompt that ends with its image has none, and T may be 0.
        vision: query and key of the vision layers asked for, by the number they were asked with.
        features: ``[I, P, Dv]`` what the projector got of every image, or None if no vision layer was asked for.
        project: the projector, ``[..., Dv]`` to ``[..., D]``, for features made anew; given with ``features``.
        sizes: per sample, the visual tokens of each image or video; None where every grid is an image.
        shares: how many images each sample's visual tokens are, where chunked prefill has cut them up; else None. Then
            ordinals count from the prompt's first visual token and ``grids`` are those of all its images so far.
    """

    layer: int
    mask: Tensor
    counts: tuple[int, ...]
    ordinals: Tensor
    positions: Tensor
    grids: tuple[tuple[Grid, ...], ...]
    hidden: Tensor | None = None
    attention: AttentionInputs | None = None
    embeds: Tensor | None = None
    image: Tensor | None = None
    text: Tensor | None = None
    vision: Mapping[int, VisionAttention] = field(default_factory=dict)
    features: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    sizes: tuple[tuple[int, ...], ...] | None = None
    shares: tuple[float, ...] | None = None

    def image_counts(self) -> tuple[float, ...]:
        """Per sample, how many images and videos its visual tokens are; part of an image counts for its share."""
        return tuple(map(len, self.images())) if self.shares is None else self.shares

    def images(self) -> tuple[tuple[int, ...], ...]:
        """Per sample, the visual tokens of each of its images and videos before any pruning."""
        if self.sizes is not None:
            return self.sizes
        return tuple(tuple(rows * columns for rows, columns in grids) for grids in self.grids)


@dataclass(frozen=True)
class Reduction:
    """A choice that also changes the tokens: rows merged or made anew, another order, other positions.

    Attributes:
        index: ``[B, K]`` int64 whose places among the entering tokens are used, each once, -1 on the right. The rows
            stand in this order where the image stood; a merged token may so follow the kept ones.
        hidden: ``[B, K, D]`` the rows' new hidden states, or None to keep theirs.
        positions: "keep" the rotary positions of the places used, or "pack" all rows to 0, 1, 2, ... without gaps.
    """

    index: Tensor
    hidden: Tensor | None = None
    positions: Literal["keep", "pack"] = "keep"


def keep_count(keep: float, tokens: int, images: float = 1) -> int:
    """How many of ``tokens`` survive: a float is a share, an int is a number per image. Never more than there are."""
    if tokens == 0:
        return 0
    if isinstance(keep, int):
        return min(tokens, max(1, int(keep * images + 1e-6)))
    return min(tokens, max(1, int(keep * tokens + 1e-6)))


def check_keep(keep: object, name: str = "keep") -> None:
    """Raise ValueError unless ``keep`` is a float in (0, 1] or an int of at least 1."""
    ok = isinstance(keep, int | float) and not isinstance(keep, bool)
    ok = ok and (0.0 < keep <= 1.0 if isinstance(keep, float) else keep >= 1)  # type: ignore[operator]
    check(ok, name, "a share in (0, 1] or a whole number of tokens per image >= 1", repr(keep))


def check_layer(layer: object, least: int = 0, why: str = "") -> None:
    """Raise ValueError unless ``layer`` is an int of at least ``least``."""
    ok = isinstance(layer, int) and not isinstance(layer, bool) and layer >= least
    check(ok, "layer", f"a whole number >= {least}{why}", repr(layer))


def quotas(ctx: TokenContext, keep: float) -> list[int]:
    """How many tokens each sample keeps at this stage, on the host."""
    return [keep_count(keep, n, images) for n, images in zip(ctx.counts, ctx.image_counts(), strict=True)]


def select_scores(scores: Tensor, ctx: TokenContext, keep: float) -> Tensor:
    """``select_counts`` for a share (float) or a number per image (int)."""
    return select_counts(scores, ctx, quotas(ctx, keep))


def select_counts(scores: Tensor, ctx: TokenContext, kept: Sequence[int]) -> Tensor:
    """Numbers ``[B, K]`` of the ``kept[b]`` best-scored entering tokens, ascending, -1 on the right; no host sync.

    Ties go to the lower number and NaN ranks below everything, so a sample of broken scores keeps its first tokens.

    Args:
        scores: ``[B, N]``, the higher survives; padding may hold anything.
        ctx: the stage's context.
        kept: one number per sample, at most ``ctx.counts``.
    """
    width = max(kept, default=0)
    if len(set(kept)) == 1 and all(n == ctx.mask.shape[1] for n in ctx.counts):
        return ops.select_topk(scores, width)[0]
    quota = torch.tensor(kept, dtype=torch.int64).to(scores.device, non_blocking=True)
    code = torch.where(ctx.mask, 0, 2).to(torch.int8)
    return ops.select_topk(scores, quota, code=code)[0][:, :width]


@dataclass(frozen=True)
class PruningPolicy(ABC):
    """Decides which visual tokens survive at its stages. Holds settings only, never tensors or run state.

    Args:
        earlier_kv: what the layers before the last stage hold in the KV cache once the prompt has run: "full", every
            token they saw, or "compact", only what survived the last stage (the answer then attends to nothing else).

    Raises:
        ValueError: a setting is out of range.
    """

    summary: ClassVar[str] = ""
    """One line for ``vlmprune list``."""
    paper: ClassVar[str] = ""
    """Where the method comes from."""
    checked: ClassVar[str] = "formula"
    """"formula": compared with an independent implementation of the published formula; "reading": the sources leave
    room, and the docstring says how it was used."""
    flash_attention: ClassVar[bool] = True
    """Whether the method works when no attention matrix exists: it does if it scores through ``AttentionInputs``."""
    batched: ClassVar[bool] = True
    """Whether it takes padded batches of more than one sample."""
    presets: ClassVar[Mapping[int, str]] = {}
    """Settings, as typed on the command line, for a mean of 192, 128 and 64 visual tokens of 576 over 32 layers."""

    earlier_kv: Literal["full", "compact"] = field(default="full", kw_only=True)

    def __new__(cls, *args: Any, earlier_kv: object = "full", **settings: Any) -> Self:
        """Check what every policy has, whatever ``__post_init__`` its class brings."""
        check(earlier_kv in ("full", "compact"), "earlier_kv", "'full' or 'compact'", repr(earlier_kv))
        names = (setting.name for setting in fields(cls) if not setting.kw_only)
        for name, value in {**dict(zip(names, args, strict=False)), **settings}.items():
            for number in value if isinstance(value, tuple | list) else (value,):
                foreign = isinstance(number, np.generic) and not isinstance(number, float)
                check(not foreign, name, "Python's own numbers: int(...) or float(...)", repr(number))
        return super().__new__(cls)

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Decoder layers at which tokens are dropped, ascending; layer K and later see the shortened sequence."""

    def needs(self, layer: int) -> Needs:
        """What ``select`` reads from its context at this stage."""
        return Needs()

    @abstractmethod
    def select(self, ctx: TokenContext) -> Tensor | Reduction:
        """Which of the visual tokens entering the stage stay: ``[B, K]`` int64 in 0..N-1, ascending, -1 on the right.

        K is what the fullest sample keeps; a sample with tokens keeps at least one. A method that merges tokens,
        reorders them or packs their positions returns a ``Reduction``. One broken sample (NaN, infinities) must change
        nothing for the others; ``vlmprune.testing.check_policy`` tries all of this.
        """

    def with_share(self, share: float) -> Self:
        """The same policy keeping ``share`` of the tokens that enter each of its stages: how a budget is met.

        Sets ``keep``, for every layer where that is a tuple. A method whose setting has another name overrides this.

        Raises:
            InputError: there is no such setting, or the others leave no room for it.
        """
        name = type(self).__name__
        there = any(setting.name == "keep" for setting in fields(self))
        other = f"none (instead of {name}, pass lambda keep: {name}(...))"
        check(there, name, "a setting 'keep' that takes a share", other)
        each = isinstance(self.keep, tuple)  # type: ignore[attr-defined]
        change: dict[str, Any] = {"keep": (share,) * len(self.layers) if each else share}
        return replace(self, **change)

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain data for JSON and YAML, which ``policy_from`` reads: its name and every setting.

        Defaults are written out, so that a recipe keeps its meaning where one changes. Tuples are lists; a function is
        the path by which it is imported.

        Raises:
            InputError: a class that nobody announced, or a setting that is neither data nor an importable function.

        Example:
            >>> from vlmprune import FastV
            >>> FastV(layer=2, keep=0.5).to_dict()
            {'policy': 'fastv', 'layer': 2, 'keep': 0.5, 'rows': 'last', 'earlier_kv': 'full'}
        """
        from vlmprune.policies.recipe import write

        return write(self)

    def __or__(self, other: PruningPolicy) -> PruningPolicy:
        """The union of what both keep, at the same layers."""
        from vlmprune.policies.compose import Union

        return Union(self, other, earlier_kv=_joint(self, other))

    def __and__(self, other: PruningPolicy) -> PruningPolicy:
        """What both keep, at the same layers."""
        from vlmprune.policies.compose import Intersection

        return Intersection(self, other, earlier_kv=_joint(self, other))


def _joint(one: PruningPolicy, other: PruningPolicy) -> Literal["full", "compact"]:
    """The setting of two policies made one; where they differ, the one that their combination then refuses."""
    return one.earlier_kv if one.earlier_kv == other.earlier_kv else "full"


def attention_of(ctx: TokenContext) -> AttentionInputs:
    """The context's attention inputs, or an error that says what the policy forgot to declare."""
    return require(ctx.attention, "ctx.attention", "query and key (declare Needs(attention='previous'))")

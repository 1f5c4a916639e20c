"""What a policy is shown at a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vlmprune.errors import check_known, require
from vlmprune.policies.inputs import AttentionInputs, Grid
from vlmprune.policies.vision import Crop, VisionAttention

Rows = Literal["hidden", "earlier", "embeds", "image", "text", "text_hidden", "start", "tokens", "features"]
Module = Literal["embed", "norm", "project"]

ASKED = {
    "hidden": ("hidden states", "Needs(hidden=True)"),
    "earlier": ("hidden states that entered the layer before", "Needs(earlier=True)"),
    "attention": ("query and key", "Needs(attention='previous')"),
    "embeds": ("input embeddings", "Needs(embeds=True)"),
    "image": ("where the images are", "Needs(embeds=True)"),
    "text": ("where the text is", "Needs(text=True) or Needs(embeds=True)"),
    "text_hidden": ("hidden states of the text", "Needs(text=True)"),
    "norm": ("the text model's last norm", "Needs(text=True)"),
    "start": ("where the prompt begins", "Needs(text=True)"),
    "tokens": ("the prompt's ids", "Needs(tokens=True)"),
    "embed": ("the table of embeddings", "Needs(tokens=True)"),
    "tokenizer": ("the tokenizer", "Needs(tokens=True)"),
    "features": ("what the projector got", "Needs(vision=...)"),
    "project": ("the projector", "Needs(vision=...)"),
}
"""What a context has only for whom it was asked: in words, and how a policy asks."""


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
        earlier: ``[B, N, D]`` hidden states with which the same tokens entered the layer before, or None if not asked for.
        attention: query and key of one layer, or None if not asked for.
        ran: ``[B, c]`` int64 numbers of the entering tokens that have run through the layers before, ascending, -1 = padding:
            the columns of ``attention``. Given for ``Needs(wave=True)`` where there are others; None = all have.
        ran_counts: how many of each sample, host ints; given with ``ran``.
        embeds: ``[B, q, D]`` input embeddings of the whole prompt chunk, or None if not asked for.
        image: ``[B, N0]`` int64 positions in the prompt chunk of all its visual tokens, before any pruning, -1 = padding;
            given with ``embeds``.
        text: ``[B, T]`` int64 positions in the prompt chunk of the text after the last image, -1 = padding; given with
            ``embeds``, ``text`` or text rows. A prompt that ends with its image has none, and T may be 0.
        vision: query and key of the vision layers asked for, by the number they were asked with.
        features: ``[I, T, Dv]`` what the projector got for the tokens of every crop, zeros where one has fewer, or None if no
            vision layer was asked for.
        project: the projector, ``[..., Dv]`` in any precision to ``[..., D]``, for features made anew; given with ``features``.
        sizes: per sample, the visual tokens of each image or video; None where every grid is an image.
        crops: per sample and image, the crops that the tower saw of it and that have tokens; None where every grid is one. A
            newline token is of none.
        shares: how many images each sample's visual tokens are, where chunked prefill has cut them up; else None. Then
            ordinals count from the prompt's first visual token and ``grids`` are those of all its images so far.
        words: how many tokens ``text`` has in each sample, host ints; None = not known (in a captured prefill).
        tokens: ``[B, q]`` int64 ids of the whole prompt chunk, -1 = padding, or None if not asked for. Given with them:
        embed, tokenizer: the table, ids ``[...]`` to ``[..., D]``, and what gives the model's tokenizer or raises ModelError.
        text_hidden: ``[B, T, D]`` hidden states of that text entering the stage, zeros at padding, or None. With them come
        norm, start: the text model's last norm, ``[..., D]`` to the same, and ``[B, 1]`` int64 in the prompt chunk each
            sample's first position that is no padding.
        ordered: False if an earlier stage has rearranged the tokens.
        shared: what the stages of one prompt chunk share: a method may keep here what depends on the prompt alone, together
            with the tensors it was made of, as a changed copy of the context has others (``policies/parts/raters.py``).
    """

    layer: int
    mask: Tensor
    counts: tuple[int, ...]
    ordinals: Tensor
    positions: Tensor
    grids: tuple[tuple[Grid, ...], ...]
    hidden: Tensor | None = None
    earlier: Tensor | None = None
    attention: AttentionInputs | None = None
    ran: Tensor | None = None
    ran_counts: tuple[int, ...] | None = None
    embeds: Tensor | None = None
    image: Tensor | None = None
    text: Tensor | None = None
    vision: Mapping[int, VisionAttention] = field(default_factory=dict)
    features: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    sizes: tuple[tuple[int, ...], ...] | None = None
    crops: tuple[tuple[tuple[Crop, ...], ...], ...] | None = None
    shares: tuple[float, ...] | None = None
    words: tuple[int, ...] | None = None
    tokens: Tensor | None = None
    embed: Callable[[Tensor], Tensor] | None = None
    tokenizer: Callable[[], Any] | None = None
    text_hidden: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    start: Tensor | None = None
    ordered: bool = True
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether every token of every image enters in its order: no stage acted before, and no image was cut up."""
        return self.ordered and self.shares is None and self.counts == tuple(map(sum, self.images()))

    @cached_property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.mask.device

    def image_counts(self) -> tuple[float, ...]:
        """Per sample, how many images and videos its visual tokens are; part of an image counts for its share."""
        return tuple(map(len, self.images())) if self.shares is None else self.shares

    def images(self) -> tuple[tuple[int, ...], ...]:
        """Per sample, the visual tokens of each of its images and videos before any pruning."""
        found = (tuple(rows * columns for rows, columns in grids) for grids in self.grids)
        return tuple(found) if self.sizes is None else self.sizes

    @overload
    def given(self, name: Rows) -> Tensor: ...
    @overload
    def given(self, name: Literal["attention"]) -> AttentionInputs: ...
    @overload
    def given(self, name: Module) -> Callable[[Tensor], Tensor]: ...
    @overload
    def given(self, name: Literal["tokenizer"]) -> Callable[[], Any]: ...
    def given(self, name: str) -> Any:
        """What was asked for under this name.

        Raises:
            InputError: it was not, and what the policy forgot to declare; or nothing is called that.

        Example:
            >>> ctx.given("attention").received().shape  # of two samples, the fuller one with 8 visual tokens
            torch.Size([2, 8])
        """
        check_known(name, ASKED, "name")
        what, need = ASKED[name]
        return require(getattr(self, name), f"ctx.{name}", f"{what} (declare {need})")

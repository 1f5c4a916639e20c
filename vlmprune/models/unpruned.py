"""A chunk of a prompt before any stage: its rows, its images, its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from vlmprune.models.crop_reads import Seen
from vlmprune.models.host.cells import crops_of
from vlmprune.models.host.views import image_tokens
from vlmprune.models.layout import Layout, moved
from vlmprune.models.text_span import TextSpan, text_rows
from vlmprune.policies.base import Crop, Grid, tokens_in


@dataclass(frozen=True)
class Unpruned:
    """A chunk before any stage.

    Attributes:
        layout: its rows, which are its positions.
        seen: each sample's images; in a chunk of a prompt those of the whole prompt so far.
        shares: how many images the visual tokens of each sample are, where chunked prefill cut them up; else None.
        patches: rows and columns of a crop in patches, where images are cut into tiles.
        text: where the text after the last image is, if a stage asks for it.
        embeds: ``[B, q, D]`` input embeddings, if a stage asks for them.
        shared: what its stages have made of it for one another.
    """

    layout: Layout
    seen: Seen
    shares: tuple[float, ...] | None = None
    text: TextSpan | None = None
    embeds: Tensor | None = None
    patches: Grid | None = None
    shared: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def words(self) -> Tensor:
        """``[B, T]`` the rows of the text after the last image, -1 = padding."""
        assert self.text is not None
        return text_rows(self.layout, self.text)

    def words_in(self, layout: Layout) -> Tensor:
        """The same in a layout that came of this one."""
        assert self.text is not None
        if layout.origin is None:
            return moved(self.words, layout.visual.device)
        return text_rows(layout, self.text)

    @property
    def facts(self) -> tuple[Any, ...]:
        """What a policy is shown of it in numbers."""
        return self.seen.images, self.shares, None if self.text is None else self.text.words

    @cached_property
    def grids(self) -> tuple[tuple[Grid, ...], ...]:
        """Those of each sample, whatever image they belong to."""
        found = (tuple(view.grid for image in sample for view in image) for sample in self.seen.images)
        return tuple(tuple(grid for grid in own if tokens_in([grid])) for own in found)

    @cached_property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Visual tokens of each sample's images; of all their parts together, where they were cut up."""
        if self.shares is not None:
            return tuple((n,) for n in self.layout.counts)
        return tuple(tuple(map(image_tokens, sample)) for sample in self.seen.images)

    @cached_property
    def crops(self) -> tuple[tuple[tuple[Crop, ...], ...], ...] | None:
        """Those of each sample's images, where they are not its grids."""
        if self.patches is None or self.shares is not None:
            return None
        return tuple(crops_of(sample, self.patches) for sample in self.seen.images)

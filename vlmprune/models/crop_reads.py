"""What a policy is shown of the vision tower: its query, key and features, put into the crops and tokens of a call."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlmprune.constants import remembered, whole_numbers
from vlmprune.models.host.cells import (
    Packed,
    group_rows,
    mosaic_cells,
    mosaic_shares,
    packed_cells,
    packed_frames,
    packed_units,
    plain,
)
from vlmprune.models.host.families import Family, Tower
from vlmprune.models.host.names import attribute
from vlmprune.models.host.views import Encoded, ImageViews, crop_grid
from vlmprune.policies.base import VisionAttention
from vlmprune.policies.vision import mixed


class Seen(NamedTuple):
    """The images of a call.

    Attributes:
        images: those of each sample, in prompt order.
        kinds: which of the call's runs of the tower each is from, images before videos.
    """

    images: tuple[tuple[ImageViews, ...], ...]
    kinds: tuple[tuple[int, ...], ...]

    @property
    def flat(self) -> tuple[ImageViews, ...]:
        """All of them."""
        return tuple(chain(*self.images))

    def numbers(self, copies: int) -> tuple[int, ...]:
        """Which image of the tower's runs each is: beam search repeats samples, ``copies`` times each, not their images."""
        found, first = [], 0
        for kind in sorted({*chain(*self.kinds)}):
            places = [[i for i, k in enumerate(own) if k == kind] for own in self.kinds]
            for b, own in enumerate(places):
                found += [((b, i), first + j) for j, i in enumerate(own)]
                first += len(own) if (b + 1) % copies == 0 else 0
        return tuple(number for _, number in sorted(found))


def crops_in(image: ImageViews) -> int:
    """How many crops the tower saw of an image."""
    return sum(view.crops[0] * view.crops[1] for view in image)


class Encoder(Protocol):
    """The parts of a model that make visual tokens: a ``Parts``, or what another host has of them."""

    @property
    def config(self) -> Any:
        """The model's."""

    @property
    def family(self) -> Family:
        """Its entry in the table of families."""

    @property
    def tower(self) -> Tower:
        """Its vision tower's."""

    @property
    def projector(self) -> Any:
        """What makes tokens of the tower's features."""


class CropReads:
    """Puts a note of the vision tower into the order of a call's images."""

    def __init__(self, parts: Encoder) -> None:
        self.parts, self.side = parts, parts.family.side(parts.config)

    def fields(self, scales: Mapping[int, float], note: Encoded, seen: Seen, depth: int) -> dict[str, Any]:
        """The fields of a context, with the layers of these softmax scales; the tower has ``depth`` of them."""
        assert note.features is not None
        copies = sum(map(crops_in, seen.flat)) // len(note.crops)
        order = seen.numbers(copies)
        if note.thw is not None:
            return self._packed(scales, note, seen, order, depth)
        sizes = dict(zip(order, map(crops_in, seen.flat), strict=True))
        mine = _Mine.of(order, [sizes[number] for number in sorted(sizes)])
        grid, mask = crop_grid(self.parts.config, note), None if note.mask is None else mine(note.mask)
        cells = shares = None
        features = mine(note.features)
        if not plain(seen.flat, self.side):
            how = seen.flat, grid, self.side, features.device
            cells, shares = mosaic_cells(*how), mosaic_shares(*how)
            if self.side == 1:
                features = mixed(features, cells, shares).to(features)
        vision = {}
        for layer, scale in scales.items():
            own = _own(note, layer, mine)
            cls = self.parts.tower.cls
            vision[layer] = VisionAttention(
                **own, scale=scale, cls=cls, mask=mask, cells=cells, shares=shares
            )
        return {"vision": vision, "features": features, "project": _Projector(self.parts.projector, features)}

    def _packed(
        self, scales: Mapping[int, float], note: Encoded, seen: Seen, order: tuple[int, ...], depth: int
    ) -> dict[str, Any]:
        assert note.thw is not None and note.features is not None
        mine = _Mine.of(order, [t * h * w for t, h, w in note.thw])
        frames = tuple(view.grid for image in seen.flat for view in image)
        config, m = self.parts.config.vision_config, self.side**2
        window = full = None
        if self.parts.tower.windows is not None:
            window = config.window_size // config.patch_size // self.side
            full = {*attribute(config, self.parts.tower.windows)}
        vision = {}
        for layer, scale in scales.items():
            inside = None if full is None or layer % depth in full else window
            packed = packed_frames(frames, self.side, inside, window)
            vision[layer] = self._attention(note, layer, scale, packed, mine, inside is not None)
        units = packed_units(packed_frames(frames, self.side, None, window), note.features.device)
        blocks = mine(note.features).view(-1, m * note.features.shape[1])
        features = mixed(blocks[None], units, None).to(blocks)
        return {
            "vision": vision,
            "features": features,
            "project": _Projector(self.parts.projector, features, m),
        }

    def _attention(
        self, note: Encoded, layer: int, scale: float, packed: Packed, mine: _Mine, windowed: bool
    ) -> VisionAttention:
        """Of packed patches, in frames or windows."""
        own = _own(note, layer, mine)
        device = own["key"].device
        cells, rows, mask = packed_cells(packed, self.side, device), None, None
        if len(set(packed.groups)) > 1:
            at = group_rows(packed.groups, device)
            mask = at >= 0
            own = {name: x[at.clamp(min=0)] for name, x in own.items()}
        else:
            own = {name: x.view(len(packed.groups), -1, *x.shape[1:]) for name, x in own.items()}
        if windowed:
            rows = whole_numbers(tuple(len(units) * self.side**2 for units in packed.units), device)
            rows = rows[:, None].float()
        own = {name: x.transpose(1, 2) for name, x in own.items()}
        return VisionAttention(**own, scale=scale, cls=False, mask=mask, cells=cells, rows=rows)


def _own(note: Encoded, layer: int, mine: _Mine) -> dict[str, Tensor]:
    """A call's query and key of a layer, and its values if they were noted, by their names in a ``VisionAttention``."""
    names = {"q": "query", "k": "key", "v": "value"}
    return {
        field: mine(note.taken[layer, name]) for name, field in names.items() if (layer, name) in note.taken
    }


class _Projector:
    """The projector, for features ``[..., Dv]`` in any precision; with ``patches`` for those of so many of each token, in a row.

    It works in the precision of the features that it got.
    """

    def __init__(self, projector: Any, features: Tensor, patches: int | None = None) -> None:
        self.projector, self.dtype, self.patches = projector, features.dtype, patches

    def __call__(self, features: Tensor) -> Tensor:
        """``[..., D]``. No call of the module: no hook should see it."""
        rows = features.to(self.dtype)
        if self.patches is None:
            made: Tensor = self.projector.forward(rows)
            return made
        made = self.projector.forward(rows.reshape(-1, rows.shape[-1] // self.patches))
        return made.view(*rows.shape[:-1], made.shape[-1])


class _Mine(NamedTuple):
    """Takes a call's own rows from what the tower gave, by ranges; None = all of them, as they are."""

    ranges: tuple[tuple[int, int], ...] | None

    @classmethod
    def of(cls, order: tuple[int, ...], sizes: list[int]) -> _Mine:
        """For images in this order, of which the tower gave so many rows each."""
        ends = [*accumulate(sizes, initial=0)]
        once = order == tuple(range(len(sizes)))
        return cls(None if once else tuple((ends[i], ends[i + 1]) for i in order))

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.ranges is None else x[_rows_of(self.ranges, x.device)]


@remembered(64)
def _rows_of(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(first, end) for first, end in ranges]).to(device)

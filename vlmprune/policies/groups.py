"""Where a batch's images or crops lie among its visual tokens: cut them out, line up what is kept of them. Host ints only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from vlmprune.constants import remembered, whole_numbers
from vlmprune.policies.base import Crop
from vlmprune.policies.counts import even_shares

Counts = tuple[int, ...]


class Quota(NamedTuple):
    """How many tokens stay.

    Attributes:
        kept: of each group.
        rest: of each image, those that are of no group (newlines), the first ones; they stay once all others do.
    """

    kept: Counts
    rest: Counts


class Kind(NamedTuple):
    """Groups of one shape of which as many tokens stay.

    Attributes:
        members: their numbers.
        crop: one of them.
        kept: how many tokens of each stay.
    """

    members: Counts
    crop: Crop
    kept: int


@dataclass(frozen=True)
class Groups:
    """The I groups of a batch: rectangles of tokens that do not overlap.

    Attributes:
        crops: the rectangles.
        samples: which sample each is of, ascending.
        images: which image of the call each is of, ascending.
        rest: of each image, the places of its tokens that are of no group.
        owners: which sample each image is of.
        batch: B, how many samples there are.
        width: N, the places a sample has in the batch.
    """

    crops: tuple[Crop, ...]
    samples: Counts
    images: Counts
    rest: tuple[Counts, ...]
    owners: Counts
    batch: int
    width: int

    @cached_property
    def tokens(self) -> Counts:
        """How many tokens each group has."""
        return tuple(crop.rows * crop.columns for crop in self.crops)

    @cached_property
    def members(self) -> tuple[Counts, ...]:
        """Of each image, its groups."""
        found: list[list[int]] = [[] for _ in self.owners]
        for group, image in enumerate(self.images):
            found[image].append(group)
        return tuple(map(tuple, found))

    @cached_property
    def in_line(self) -> bool:
        """Whether the groups follow one another in each sample, and are all of its tokens."""
        full = all(crop.rows == 1 or crop.width == crop.columns for crop in self.crops)
        rising = all(a <= b for a, b in zip(self.crops, self.crops[1:], strict=False) if b.first)
        return full and rising and not any(self.rest)

    @cached_property
    def equal(self) -> bool:
        """Whether they are in line, equally large, and fill the batch."""
        return self.in_line and len(set(self.tokens)) == 1 and sum(self.tokens) == self.batch * self.width

    def padding(self, device: torch.device) -> Tensor | None:
        """``[I, T]`` False behind the tokens of a smaller group; None = all are as large."""
        if len(set(self.tokens)) <= 1:
            return None
        return _places(self.crops, self.samples, self.width, device) >= 0

    def split(self, x: Tensor) -> Tensor:
        """Cut ``x [B, N, ...]`` into groups ``[I, T, ...]``; T is the largest one's tokens, padding is zeros."""
        if self.equal:
            return x.reshape(len(self.tokens), self.tokens[0], *x.shape[2:])
        return rows_or(x, _places(self.crops, self.samples, self.width, x.device), 0)

    def spread(self, x: Tensor, fill: float = 0) -> Tensor:
        """Put groups ``x [I, T, ...]`` back in their places, ``[B, N, ...]``; ``fill`` elsewhere."""
        if self.equal:
            return x.reshape(self.batch, self.width, *x.shape[2:])
        at = _sources(self.crops, self.samples, (self.batch, self.width, x.shape[1]), x.device)
        return rows_or(x, at, fill)

    def numbers(self, k: int, quota: Quota, device: torch.device) -> Tensor:
        """``[B, K]`` the row ``i k + j`` of what is lined up of each sample; -1 = of no group, and padding."""
        lines: list[list[int]] = [[] for _ in range(self.batch)]
        spare = iter(self._rest(quota))
        for image, owner in enumerate(self.owners):
            for group in self.members[image]:
                lines[owner] += range(group * k, group * k + quota.kept[group])
            lines[owner] += [-1] * len(next(spare))
        K = max(map(len, lines), default=0)
        at = whole_numbers(tuple((*line, *[-1] * (K - len(line))) for line in lines), device)
        return at.view(self.batch, K)

    def join(self, x: Tensor, quota: Quota) -> Tensor:
        """Line up the first ``kept[i]`` rows of every group of ``x [I, k, ...]``: ``[B, K, ...]``; zeros for what is of none."""
        if self._all(x.shape[1], quota):
            return x.reshape(self.batch, -1, *x.shape[2:])
        return rows_or(x, self.numbers(x.shape[1], quota, x.device), 0)

    def places(self, within: Tensor) -> Tensor:
        """Turn places within each group ``[I, k]`` into places within the sample; -1 stays."""
        numbers = tuple((crop.first, crop.width, crop.columns) for crop in self.crops)
        first, wide, columns = whole_numbers(numbers, within.device)[:, :, None].unbind(1)
        places = within + first
        if not all(crop.width == crop.columns or crop.rows == 1 for crop in self.crops):
            places += within.clamp(min=0) // columns * (wide - columns)
        return torch.where(within < 0, -1, places)

    def index(self, picked: Tensor, quota: Quota) -> Tensor:
        """Turn places within each group ``[I, k]`` into places within the sample ``[B, K]``, -1 on the right."""
        places, k = self.places(picked), picked.shape[1]
        if self._all(k, quota):
            return places.reshape(self.batch, -1)
        index = rows_or(places, self.numbers(k, quota, picked.device), -1)
        return index if not any(quota.rest) else torch.maximum(index, self._rest_places(quota, index))

    def shared_out(self, budgets: Sequence[int]) -> Quota:
        """Each image's budget shared out evenly over its groups; what one cannot take goes to the others, then to the rest."""
        kept: list[int] = []
        left: list[int] = []
        for image, budget in enumerate(budgets):
            sizes = [self.tokens[group] for group in self.members[image]]
            shares = even_shares(min(budget, sum(sizes)), sizes)
            kept += shares
            left.append(budget - sum(shares))
        return Quota(tuple(kept), tuple(left))

    def by_sample(self, of_groups: Counts, of_images: Counts | None = None) -> tuple[Counts, ...]:
        """Numbers of groups (and of images), put together by sample."""
        out: list[list[int]] = [[] for _ in range(self.batch)]
        for sample, n in zip(self.samples, of_groups, strict=True):
            out[sample].append(n)
        for sample, n in zip(self.owners, of_images or [0] * len(self.owners), strict=True):
            out[sample] += [n] * (of_images is not None)
        return tuple(map(tuple, out))

    def kinds(self, quota: Quota, *more: Counts) -> Iterator[Kind]:
        """The groups sorted by shape and by how many stay (and by ``more``), so that those of one kind can run together."""
        found: dict[Counts, list[int]] = {}
        for i, (crop, *counts) in enumerate(zip(self.crops, quota.kept, *more, strict=True)):
            found.setdefault((crop.rows, crop.columns, *counts), []).append(i)
        for members in found.values():
            yield Kind(tuple(members), self.crops[members[0]], quota.kept[members[0]])

    def take(self, x: Tensor, kind: Kind) -> Tensor:
        """The groups of one kind of ``x [I, T, ...]``, without padding."""
        tokens = kind.crop.rows * kind.crop.columns
        x = x if tokens == x.shape[1] else x[:, :tokens]
        return x if len(kind.members) == len(self.crops) else x[whole_numbers(kind.members, x.device)]

    def together(self, parts: Sequence[tuple[Kind, Tensor]]) -> Tensor:
        """``[I, k, ...]`` of what each kind's groups gave, ``[i, k', ...]``; the shorter ones end in zeros."""
        if len(parts) == 1:
            return parts[0][1]
        most, device = max(x.shape[1] for _, x in parts), parts[0][1].device
        wide = [torch.cat([x, x.new_zeros(len(x), most - x.shape[1], *x.shape[2:])], 1) for _, x in parts]
        order = [group for kind, _ in parts for group in kind.members]
        back = tuple(sorted(range(len(order)), key=order.__getitem__))
        return torch.cat(wide)[whole_numbers(back, device)]

    def by_kind(
        self, quota: Quota, choose: Callable[[Kind], tuple[Tensor, ...]], *more: Counts
    ) -> tuple[Tensor, ...]:
        """What ``choose`` gives of the groups of every kind, several tensors ``[i, k, ...]``, each of them ``together``."""
        found = [(kind, choose(kind)) for kind in self.kinds(quota, *more)]
        parts = range(len(found[0][1]))
        return tuple(self.together([(kind, given[n]) for kind, given in found]) for n in parts)

    def _rest(self, quota: Quota) -> list[Counts]:
        return [places[:n] for places, n in zip(self.rest, quota.rest, strict=True)]

    def _all(self, k: int, quota: Quota) -> bool:
        """Whether there is nothing to leave out or to fill."""
        each = len(self.crops) // max(self.batch, 1)
        even = all(self.samples.count(b) == each for b in range(self.batch))
        return even and set(quota.kept) == {k} and not any(quota.rest)

    def _rest_places(self, quota: Quota, index: Tensor) -> Tensor:
        """``[B, K]`` the places of tokens of no group, -1 elsewhere."""
        lines: list[list[int]] = [[] for _ in range(self.batch)]
        for image, (owner, places) in enumerate(zip(self.owners, self._rest(quota), strict=True)):
            lines[owner] += [-1] * sum(quota.kept[group] for group in self.members[image])
            lines[owner] += places
        K = index.shape[1]
        return whole_numbers(tuple((*line, *[-1] * (K - len(line))) for line in lines), index.device)


def places_of(crop: Crop) -> list[int]:
    """The places of a crop's tokens among its sample's, row by row."""
    return [crop.first + i * crop.width + j for i in range(crop.rows) for j in range(crop.columns)]


def rows_or(x: Tensor, at: Tensor, fill: float) -> Tensor:
    """Rows ``at`` (-1 = ``fill``) of ``x`` with its first two dims run together."""
    flat = x.flatten(0, 1)
    if not len(flat):
        return x.new_full((*at.shape, *x.shape[2:]), fill)
    rows = flat[at.clamp(min=0)]
    return rows.masked_fill(at.view(*at.shape, *[1] * (x.ndim - 2)) < 0, fill)


def real_places(groups: Groups, device: torch.device) -> Tensor:
    """``[2, n]`` int64 of the groups' n tokens: the place ``b N + n`` of each in the batch, and its ``i T + t`` among groups."""
    return _real_places(groups.crops, groups.samples, groups.width, device)


@remembered()
def _real_places(crops: tuple[Crop, ...], samples: Counts, width: int, device: torch.device) -> Tensor:
    most = max((c.rows * c.columns for c in crops), default=0)
    both = [
        (b * width + n, i * most + t)
        for i, (crop, b) in enumerate(zip(crops, samples, strict=True))
        for t, n in enumerate(places_of(crop))
    ]
    return torch.tensor(both, dtype=torch.int64).view(-1, 2).T.contiguous().to(device)


@remembered()
def _places(crops: tuple[Crop, ...], samples: Counts, width: int, device: torch.device) -> Tensor:
    """``[I, T]`` the place ``b N + n`` of every token of every group, -1 behind those of a smaller one."""
    most = max((c.rows * c.columns for c in crops), default=0)
    rows = [[b * width + n for n in places_of(crop)] for crop, b in zip(crops, samples, strict=True)]
    return torch.tensor([row + [-1] * (most - len(row)) for row in rows]).view(len(crops), most).to(device)


@remembered()
def _sources(
    crops: tuple[Crop, ...], samples: Counts, shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    """``[B, N]`` which row ``i T + t`` of the groups stands in each place, -1 = none; ``shape`` is (B, N, T)."""
    batch, width, tokens = shape
    out = torch.full((batch, width), -1, dtype=torch.int64)
    for i, (crop, b) in enumerate(zip(crops, samples, strict=True)):
        out[b, places_of(crop)] = torch.arange(crop.rows * crop.columns) + i * tokens
    return out.to(device)

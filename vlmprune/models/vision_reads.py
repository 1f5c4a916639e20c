"""Query, key and features of the vision tower, taken from its own projections as it runs: nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmprune.constants import whole_numbers
from vlmprune.errors import ModelError, check
from vlmprune.models.host.families import Encoded, crop_grid
from vlmprune.models.host.names import Arguments, Signature, attribute
from vlmprune.models.host.parts import Parts, heads, tower_layers
from vlmprune.models.per_thread import PerThread
from vlmprune.models.visuals import Notes, Visuals
from vlmprune.policies.base import VisionAttention


class VisionReads:
    """Notes what every run of the vision tower saw, so that a call finds the query and key of its own images.

    While the tower runs the note waits here, one for each thread.
    """

    def __init__(self, parts: Parts, layers: Iterable[int]) -> None:
        self.parts, self.blocks = parts, tower_layers(parts)
        self.told = Signature(
            parts.vision, [n for n in (parts.tower.grids, parts.tower.padding) if n is not None]
        )
        self.notes = Notes()
        self.mine = PerThread(note=None, runs=None, crops=())
        self.attn = {layer: self._attention_of(layer) for layer in layers}

    def _attention_of(self, layer: int) -> Any:
        """A block's attention. Raises ModelError where the tower's attention says nothing about visual tokens."""
        if not self.parts.family.tapped:
            raise ModelError(
                "vision: expected a tower whose every patch is part of one visual token, got "
                f"{self.parts.config.model_type!r} (methods that read the vision tower cannot prune it)"
            )
        depth = len(self.blocks)
        check(-depth <= layer < depth, "vision layer", f"{-depth}..{depth - 1}", layer)
        return attribute(self.blocks[layer], self.parts.tower.attention)

    def register(self) -> list[RemovableHandle]:
        """Hook the tower; with layers wanted also their projections, and the projector's input."""
        tower = self.parts.vision
        handles = [
            tower.register_forward_pre_hook(self._start),
            tower.register_forward_hook(self._end, with_kwargs=True),
        ]
        for layer, attn in self.attn.items():
            for name in ("q", "k"):
                # A norm behind the projection (InternVL) has the last word on it.
                module = attribute(attn, f"{name}_norm" if self.parts.tower.normed else f"{name}_proj")
                handles.append(module.register_forward_hook(partial(self._keep, layer, name)))
        if self.attn:
            handles.append(self.parts.projector.register_forward_pre_hook(self._see))
        return handles

    def visuals(self, given: Arguments) -> Visuals | None:
        """The images and videos that a call brings, or None; until ``done``, runs of the tower in this thread are its own."""
        runs: list[Any] = []
        self.mine.runs = runs
        kinds = tuple(given.encoded) or given.pixels
        return Visuals(self.parts, kinds, [*given.encoded.values()] or runs, self.notes) if kinds else None

    def done(self, visuals: Visuals) -> tuple[int, ...]:
        """The call is over. Returns the patches of every crop encoded for these images, as far as it is known."""
        crops = self.mine.crops if visuals.cut else sum((note.crops for note in visuals.seen()), ())
        self.mine.runs, self.mine.crops = None, ()
        return crops

    def fields(self, layers: Iterable[int], visuals: Visuals, images: Sequence[int]) -> dict[str, Any]:
        """The fields of a context that come from the tower, for samples with so many images each."""
        parts, note = self.parts, self.note(visuals, images)
        crops, grid = _crops_of(note, images), crop_grid(parts.config, note)

        def mine(x: Tensor) -> Tensor:
            return x if crops is None else x[whole_numbers(tuple(crops), x.device)]

        mask, seen = None if note.mask is None else mine(note.mask), {}
        for layer in layers:
            attn, side = self.attn[layer], parts.family.side(parts.config)
            query, key = (mine(heads(note.taken[layer, name], attn.head_dim)) for name in ("q", "k"))
            seen[layer] = VisionAttention(query, key, attn.scale, parts.tower.cls, grid, side, mask)
        assert note.features is not None
        # project is no call of the module: no hook should see it
        return {"vision": seen, "features": mine(note.features), "project": parts.projector.forward}

    def note(self, visuals: Visuals, images: Sequence[int]) -> Encoded:
        """The note on this call's images: features cut up, or encoded outside the scope, come without."""
        note, *more = visuals.seen()
        taken = not more and {(layer, "k") for layer in self.attn} <= {*note.taken}
        wanted = sum(images)
        if not taken or not note.crops or wanted % len(note.crops):
            got = f"those of {len(note.crops)}" if taken else "none"
            raise ModelError(
                f"vision: expected query and key of the {wanted} images of this call, got {got} "
                "(images must be encoded whole, by this model, inside the scope)"
            )
        return note

    # Hooks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start(self, module: nn.Module, args: Any) -> None:
        self.mine.note = Encoded()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _end(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        tower, note, given = self.parts.tower, self.mine.note, self.told.read(args, kwargs)
        if tower.grids is not None:
            note.thw = given[tower.grids].tolist()  # as the tower itself reads it
            note.crops = tuple(h * w for t, h, w in note.thw for _ in range(t))
        else:
            crops, states = output.last_hidden_state.shape[:2]
            note.crops = (states - tower.cls,) * crops
            mask = None if tower.padding is None else given[tower.padding]
            note.mask = None if mask is None else mask.flatten(1)
        self.notes.add(output, note)
        self.mine.crops += note.crops
        if self.mine.runs is not None:
            self.mine.runs.append(output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, layer: int, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.mine.note is not None:  # none is open where a checkpointed block is replayed
            self.mine.note.taken[layer, name] = output.detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.mine.note is not None:
            self.mine.note.features, self.mine.note = args[0].detach(), None


def _crops_of(note: Encoded, images: Sequence[int]) -> list[int] | None:
    """Which crop each image of the call is; None = one after the other. Beam search repeats samples, not crops."""
    copies = sum(images) // len(note.crops)
    if copies == 1:
        return None
    crops: list[int] = []
    first = 0
    for b, count in enumerate(images):
        crops += range(first, first + count)
        first += count if (b + 1) % copies == 0 else 0
    return crops

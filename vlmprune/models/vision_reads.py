"""Query, key and features of the vision tower, taken from its own projections as it runs: nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from inspect import Signature, signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import ModelError, check
from vlmprune.models.crop_reads import CropReads, Seen, crops_in
from vlmprune.models.host.names import Arguments, attribute
from vlmprune.models.host.names import Signature as Names
from vlmprune.models.host.parts import Parts, heads, tower_layers
from vlmprune.models.host.views import Encoded
from vlmprune.models.per_thread import PerThread
from vlmprune.models.visuals import Notes, Visuals


class VisionReads:
    """Notes what every run of the vision tower saw, so that a call finds the query and key of its own images.

    While the tower runs the note waits here, one for each thread.

    Args:
        parts: the model's.
        layers: which vision layers are read.
        values: whether their values are, too.
    """

    def __init__(self, parts: Parts, layers: Iterable[int], values: bool = False) -> None:
        self.parts, self.blocks = parts, tower_layers(parts)
        self.names = ("q", "k", "v") if values else ("q", "k")
        self.told = Names(
            parts.vision, [n for n in (parts.tower.grids, parts.tower.padding) if n is not None]
        )
        self.notes = Notes()
        self.mine = PerThread(note=None, runs=None, crops=(), sizes=None)
        self.attn = {layer: self._attention_of(layer) for layer in layers}
        self.crops = CropReads(parts)

    def _attention_of(self, layer: int) -> Any:
        """A block's attention."""
        depth = len(self.blocks)
        check(-depth <= layer < depth, "vision layer", f"{-depth}..{depth - 1}", layer)
        return attribute(self.blocks[layer], self.parts.tower.attention)

    def register(self) -> Iterator[Any]:
        """Hook the tower; with layers wanted also their projections, and the projector's input. Each handle as it is made."""
        tower, fused = self.parts.vision, self.parts.tower.fused
        yield tower.register_forward_pre_hook(self._start)
        yield tower.register_forward_hook(self._end, with_kwargs=True)
        if self.parts.family.tiles:
            yield Instead(self.parts.base, self)
        for layer, attn in self.attn.items():
            if fused is not None:
                told = Names(attn, ("position_embeddings",))
                yield attn.register_forward_pre_hook(partial(self._turn, told), with_kwargs=True)
                keep = partial(self._keep_fused, layer, attn)
                yield attribute(attn, fused).register_forward_hook(keep)
            for name in self.names if fused is None else ():
                keep = partial(self._keep, layer, name, attn)
                yield self._projection(attn, name).register_forward_hook(keep)
        if self.attn and fused is None:
            # torch.compile runs what it made of the first block as every block: it must have seen hooks there
            first = self._attention_of(0)
            for name in self.names:
                yield self._projection(first, name).register_forward_hook(_nothing)
        if self.attn:
            yield self.parts.projector.register_forward_pre_hook(self._see)

    def _projection(self, attn: Any, name: str) -> Any:
        """Of the query ("q"), key ("k") or value ("v"); a norm behind the first two (InternVL) has the last word."""
        normed = self.parts.tower.normed and name != "v"
        return attribute(attn, f"{name}_norm" if normed else f"{name}_proj")

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

    def fields(self, layers: Iterable[int], visuals: Visuals, seen: Seen) -> dict[str, Any]:
        """The fields of a context that come from the tower, for the images of a call."""
        scales = {layer: attribute(self.attn[layer], self.parts.tower.scale) for layer in layers}
        return self.crops.fields(scales, self.note(visuals, seen), seen, len(self.blocks))

    def note(self, visuals: Visuals, seen: Seen) -> Encoded:
        """The note on this call's images: features cut up, or encoded outside the scope, come without."""
        notes = visuals.seen()
        wanted = {(layer, "k") for layer in self.attn}
        taken = all(wanted <= {*note.taken} and note.features is not None for note in notes)
        crops, have = sum(map(crops_in, seen.flat)), sum(len(note.crops) for note in notes)
        if not taken or not have or crops % have:
            got = f"those of {have}" if taken else "none"
            raise ModelError(
                f"vision: expected query and key of the {crops} crops of this call, got {got} "
                "(images must be encoded whole, by this model, inside the scope)"
            )
        return notes[0] if len(notes) == 1 else _together(notes)

    # Hooks

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _start(self, module: nn.Module, args: Any) -> None:
        sizes, ratio = self.mine.sizes or ((), None)
        self.mine.note = Encoded(sizes=sizes, ratio=ratio)

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
        if tower.grids is not None:
            self.mine.note = None  # the projector is inside it
        if self.mine.runs is not None:
            self.mine.runs.append(output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep(self, layer: int, name: str, attn: Any, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.mine.note is not None:  # none is open where a checkpointed block is replayed
            self.mine.note.taken[layer, name] = heads(output.detach(), attn.head_dim)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _turn(self, told: Names, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.mine.note is not None:
            self.mine.note.rope = told.read(args, kwargs)["position_embeddings"]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _keep_fused(self, layer: int, attn: Any, module: nn.Module, args: Any, output: Tensor) -> None:
        note = self.mine.note
        if note is not None:
            cos, sin = (t.detach()[:, None].float() for t in note.rope)
            query, key, value = output.detach().view(len(output), 3, -1, attn.head_dim).unbind(1)
            if "v" in self.names:
                note.taken[layer, "v"] = value
            for name, x in (("q", query), ("k", key)):  # in float32, as the tower turns them
                first, second = x.float().chunk(2, -1)
                turned = torch.cat([-second, first], -1)
                note.taken[layer, name] = (x.float() * cos + turned * sin).to(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.mine.note is not None:
            self.mine.note.features = args[0].detach()
            if self.parts.tower.grids is None:
                self.mine.note = None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _nothing(module: nn.Module, args: Any, output: Tensor) -> None:
    """A hook that is only there."""


def _together(notes: Sequence[Encoded]) -> Encoded:
    """What was noted of the runs on images and on videos, as of one run."""
    names = notes[0].taken.keys()
    return Encoded(
        crops=sum((note.crops for note in notes), ()),
        thw=None if notes[0].thw is None else [thw for note in notes for thw in note.thw or ()],
        taken={name: torch.cat([note.taken[name] for note in notes]) for name in names},
        features=torch.cat([note.features for note in notes if note.features is not None]),
    )


class Instead:
    """Stands on one base model in the place of ``get_image_features``, whose sizes of images reach no module of it.

    Both the model's own forward and ``generate``, which encodes ahead, go through it. What other code has put in that place
    before is called, and stands there again afterwards. Acts as a hook's handle.
    """

    id = "get_image_features"

    def __init__(self, base: Any, reads: VisionReads) -> None:
        self.base, self.reads, self.before = base, reads, vars(base).get(self.id)
        self.names = reads.parts.family.tiles
        self.told = Names(base, self.names, self.id)
        vars(base)[self.id] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What stood here before, else the class's own; its run of the tower then knows of the sizes."""
        mine, given = self.reads.mine, self.told.read(args, kwargs)
        mine.sizes = self._sizes(given)
        try:
            return self._method(*args, **kwargs)
        finally:
            mine.sizes = None

    def _sizes(self, given: dict[str, Any]) -> tuple[tuple[tuple[int, int] | None, ...], str | None]:
        """Height and width of every image that is tiled, and LLaVA-OneVision's ratio. transformers reads them, too."""
        sizes, *more = (given[name] for name in self.names)
        sizes = sizes.tolist() if isinstance(sizes, Tensor) else [list(size) for size in sizes]
        counts, ratio = more or (None, None)
        if more and ratio is None:
            ratio = self.base.config.vision_aspect_ratio
        alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts.tolist() for _ in range(n)]
        return tuple((h, w) if tiles else None for (h, w), tiles in zip(sizes, alone, strict=True)), ratio

    @property
    def __signature__(self) -> Signature:
        """That of what it stands for: by its names ``generate`` knows what to hand over."""
        return signature(self._method)

    @property
    def _method(self) -> Any:
        return (
            MethodType(type(self.base).get_image_features, self.base) if self.before is None else self.before
        )

    def hooks_dict_ref(self) -> dict[str, Any]:
        """Where it stands."""
        return vars(self.base)

    def remove(self) -> None:
        """Leave, unless other code stands there now."""
        place = vars(self.base)
        if place.get(self.id) is not self:
            return
        del place[self.id]
        if self.before is not None:
            place[self.id] = self.before

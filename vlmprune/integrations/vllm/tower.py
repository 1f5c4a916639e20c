"""Query, key and features of vLLM's vision towers, noted as they run, in the form in which our own wiring notes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather

from vlmprune.models.crop_reads import CropReads, Seen, crops_in
from vlmprune.models.host.families import FAMILIES, TOWERS, Family, Tower
from vlmprune.models.host.names import attribute
from vlmprune.models.host.views import Encoded, ImageViews


class Encoder(NamedTuple):
    """A vision tower of vLLM, as ``CropReads`` asks for one.

    Attributes:
        config: the model's.
        family, tower: their entries in our tables.
        projector: what makes visual tokens of features.
    """

    config: Any
    family: Family
    tower: Tower
    projector: Any


class TowerReads:
    """Hooks on one tower, for as long as the model lives; they note something only inside ``noting``.

    Args:
        config: the model's.
        blocks: the tower's blocks.
        attention: name of a block's attention; inside it is vLLM's attention of encoders, ``attn``.
        projector: the projector.
        layers: vision layers to read, counted as in the whole tower, of which vLLM has loaded ``blocks`` (startup.py checks).
        values: whether their values are read, too.
    """

    def __init__(
        self,
        config: Any,
        blocks: Sequence[Any],
        attention: str,
        projector: nn.Module,
        layers: Sequence[int],
        values: bool = False,
    ) -> None:
        tower = TOWERS[config.vision_config.model_type]
        self.encoder = Encoder(config, FAMILIES[config.model_type], tower, projector)
        self.depth: int = attribute(config.vision_config, tower.depth)
        self.packed = tower.grids is not None
        """Whether the patches of all images lie one behind the other, rather than in crops of one size."""
        self.note: Encoded | None = None
        self.features: list[Tensor] = []
        self.scales: dict[int, float] = {}
        self.crops = CropReads(self.encoder)
        self.names = {"q": "query", "k": "key"} | ({"v": "value"} if values else {})
        for layer in layers:
            attn = attribute(blocks[layer % self.depth], attention).attn
            self.scales[layer] = attn.scale
            attn.register_forward_pre_hook(partial(self._keep, layer), with_kwargs=True)
        if layers:  # no hook: modules that vLLM could compile call their forward past all hooks
            projector.forward = partial(self._see, projector.forward)

    @contextmanager
    def noting(self) -> Iterator[Encoded]:
        """A note of the runs inside."""
        self.note, self.features = Encoded(), []
        try:
            yield self.note
            if self.features:
                self.note.features = torch.cat(self.features)
        finally:
            self.note, self.features = None, []

    def fields(self, note: Encoded, image: ImageViews) -> dict[str, Any]:
        """The fields of a context that come from the tower, of a note on this image alone."""
        return self.crops.fields(self.scales, note, Seen(((image,),), ((0,),)), self.depth)

    def alone(self, note: Encoded, first: int, image: ImageViews, thw: list[int] | None) -> Encoded:
        """A note on one image: ``first`` is its first crop, or the first of its packed patches."""
        assert note.features is not None
        if thw is not None:
            frames, height, width = thw
            rows = slice(first, first + frames * height * width)
            crops: tuple[int, ...] = (height * width,) * frames
        else:
            rows = slice(first, first + crops_in(image))
            patches = next(iter(note.taken.values())).shape[2] - self.encoder.tower.cls
            crops = (patches,) * crops_in(image)
        taken = {name: x[rows] for name, x in note.taken.items()}
        return Encoded(crops, None if thw is None else [thw], taken=taken, features=note.features[rows])

    # Hooks

    def _keep(self, layer: int, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.note is None:
            return
        told = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        for name, called in self.names.items():
            x = told[called]
            # [crops, T, heads of this rank, D], or [1, patches, heads of this rank, D]
            own = x.view(*x.shape[:2], -1, attn.head_size)
            every = tensor_model_parallel_all_gather(own.contiguous(), dim=2)
            self.note.taken[layer, name] = every[0] if self.packed else every.transpose(1, 2)

    def _see(self, forward: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        if self.note is not None:
            self.features.append(features.flatten(0, 1) if self.packed and features.ndim == 3 else features)
        return forward(features)

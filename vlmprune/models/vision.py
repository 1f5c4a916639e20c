"""Query, key and features of the vision tower, taken from its own projections as it runs: nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmprune.errors import ModelError, check
from vlmprune.models.family import Parts
from vlmprune.models.probe import heads
from vlmprune.policies.base import VisionAttention


class VisionTaps:
    """Keeps the latest encoded images' query, key and features.

    They wait on the engine, not in the call's own state: generate() encodes images before it calls the model. So one
    model must not encode two batches of images at once (two threads need two models).
    """

    def __init__(self, parts: Parts, layers: Iterable[int]) -> None:
        tower = getattr(parts.vision, "vision_model", parts.vision)
        self.cls = parts.config.vision_config.model_type == "clip_vision_model"
        self.projector = parts.projector
        depth = len(tower.encoder.layers)
        self.attn: dict[int, Any] = {}
        for layer in layers:
            check(-depth <= layer < depth, "vision layer", f"{-depth}..{depth - 1}", layer)
            self.attn[layer] = tower.encoder.layers[layer].self_attn
        self.taken: dict[tuple[int, str], Tensor] = {}
        self.seen: Tensor | None = None

    def register(self) -> list[RemovableHandle]:
        """Hook the projections of the wanted layers, and the projector's input."""
        handles = []
        for layer, attn in self.attn.items():
            for name in ("q_proj", "k_proj"):
                handles.append(getattr(attn, name).register_forward_hook(self._taker(layer, name)))
        if self.attn:
            handles.append(self.projector.register_forward_pre_hook(self._see))
        return handles

    def attention(self, layer: int, images: int) -> VisionAttention:
        """Query and key of a vision layer, for the ``images`` of the running call."""
        attn = self.attn[layer]
        query, key = (heads(self._get(layer, name, images), attn.head_dim) for name in ("q_proj", "k_proj"))
        return VisionAttention(query, key, attn.scale, self.cls)

    def features(self, images: int) -> Tensor:
        """``[I, P, Dv]`` what the projector got."""
        return _same_images(self.seen, images)

    def _get(self, layer: int, name: str, images: int) -> Tensor:
        return _same_images(self.taken.get((layer, name)), images)

    def _taker(self, layer: int, name: str) -> Any:
        def take(module: nn.Module, args: Any, output: Tensor) -> None:
            self.taken[layer, name] = output.detach()

        return take

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen = args[0].detach()


def _same_images(taken: Tensor | None, images: int) -> Tensor:
    """What was taken, if it belongs to this call: features encoded elsewhere leave no query and key here."""
    got = 0 if taken is None else taken.shape[0]
    if taken is None or got != images:
        raise ModelError(
            f"vision: expected query and key of the {images} images of this call, got those of {got} "
            "(images must be encoded by this model inside the scope, one row per prompt)"
        )
    return taken

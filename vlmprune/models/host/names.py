"""What the installed transformers calls things: the one place that knows. Read off its own signatures at every attach.

A name that is not where it was is an error that says so, never "there is none": a renamed keyword that reads as None is
a wrong answer without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache

from vlmprune.errors import VersionError
from vlmprune.models.host.versions import release

CACHE = ("cache", "past_key_values")
"""The KV cache in calls and outputs, newest name first. transformers 5.24 renamed it, and takes the old one from callers."""
ENCODED = "mm_encoder_outputs"
"""What generate() has encoded ahead, since transformers 5.18; before that it leaves it to the model."""
BASE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
LAYER = ("hidden_states", "attention_mask", "position_ids", "position_embeddings")
ATTENTION = ("hidden_states", "position_embeddings")
MODEL = ("labels", "logits_to_keep")
DEEPSTACK = ("visual_pos_masks", "deepstack_visual_embeds")
"""Where visual tokens are, and what the text model adds to them behind its first layers (Qwen3-VL)."""
SIZES = "image_sizes"
"""Argument of ``get_image_features`` where an image's tiles depend on its size."""
ONEVISION = ("batch_num_images", "vision_aspect_ratio")
"""More arguments of LLaVA-OneVision's: images of each sample, and by how many tiles an image's tokens are bounded."""
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Bounds of the samples of a packed batch, which travel among a call's other keywords (FlashAttentionKwargs)."""


def missing(where: str, name: str) -> NoReturn:
    """Raise VersionError for a name that this transformers does not have."""
    raise VersionError(
        f"transformers {transformers.__version__}: expected {name!r} in {where}, found none (renamed since "
        "this vlmprune was written: please report it)"
    )


def attribute(owner: Any, name: str) -> Any:
    """``owner.name``, an attribute that every supported transformers has."""
    if not hasattr(owner, name):
        missing(type(owner).__name__, name)
    return getattr(owner, name)


class Signature:
    """The arguments of a module's ``forward``, or of another method, found by name however the caller passed them."""

    def __init__(self, module: nn.Module, names: Iterable[str], method: str = "forward") -> None:
        # The class's: accelerate and others put their own function in front of an instance's.
        kind = type(module)
        self.where = f"{kind.__name__}.{method}"
        parameters = inspect.signature(attribute(kind, method)).parameters
        self.order = [name for name in parameters if name != "self"]
        for name in names:
            if name not in parameters:
                missing(self.where, name)
        self.defaults = {name: parameters[name].default for name in names}

    def first(self, names: Iterable[str]) -> str:
        """The first of several names for one argument that is there."""
        for name in names:
            if name in self.order:
                return name
        missing(self.where, " or ".join(names))

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, with the signature's own defaults for those it leaves out."""
        return {**self.defaults, **dict(zip(self.order, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class Arguments:
    """What a call of the base model brings that matters here.

    Attributes:
        ids, embeds: ``[B, q]`` token ids, ``[B, q, D]`` embeddings; one of them is None.
        mask, position_ids: as the caller gave them.
        cache: the KV cache the caller gave, or None.
        encoded: features that generate() has encoded ahead, by "image" and "video".
        pixels: the kinds of pixels the call brings.
        packed: whether it brings the bounds of packed samples.
    """

    ids: Tensor | None
    embeds: Tensor | None
    mask: Any
    position_ids: Tensor | None
    cache: Any
    encoded: dict[str, Any]
    pixels: tuple[str, ...]
    packed: bool

    @property
    def visual(self) -> bool:
        """Whether it brings images or videos."""
        return bool(self.encoded or self.pixels)

    @property
    def shape(self) -> tuple[int, int] | None:
        """Samples and tokens; None for a call that has neither ids nor embeddings."""
        some = self.ids if self.ids is not None else self.embeds
        return None if some is None else (some.shape[0], some.shape[1])


class Host:
    """The names that matter of one model's forwards.

    Args:
        model, base, layers: the model, its base model, its decoder layers.
        pixels: the base model's argument for the pixels of each kind.
        deep: the text model, if it adds features to visual tokens behind its first layers; else None.

    Raises:
        VersionError: one of them is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        base: nn.Module,
        layers: list[Any],
        pixels: dict[str, str],
        deep: nn.Module | None = None,
    ) -> None:
        self.model = Signature(model, MODEL)
        self.ahead = release(transformers.__version__) >= (5, 18)
        ahead = (ENCODED,) if self.ahead else ()
        self.base, self.pixels = Signature(base, (*BASE, *ahead, *pixels.values())), pixels
        self.cache = Signature(layers[0], LAYER).first(CACHE)
        Signature(layers[0].self_attn, (*ATTENTION, self.cache))
        self.deep = None if deep is None else Signature(deep, DEEPSTACK)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Read a call of the base model."""
        given = self.base.read(args, kwargs)
        caches = [given[name] for name in CACHE if name in given]
        encoded = (given[ENCODED] if self.ahead else None) or {}
        pixels = {kind: given[name] for kind, name in self.pixels.items()}
        ids, embeds, mask, position_ids = (given[name] for name in BASE)
        return Arguments(
            ids=ids,
            embeds=embeds,
            mask=mask,
            position_ids=position_ids,
            cache=next((cache for cache in caches if cache is not None), None),
            encoded={
                kind: encoded[kind] for kind in self.pixels if kind in encoded and encoded[kind] is not None
            },
            pixels=tuple(kind for kind, x in pixels.items() if x is not None and len(x)),
            packed=any(name in given and given[name] is not None for name in PACKED),
        )

    def deepstack(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """What a call of the text model is to add to visual tokens behind its first layers, ``[M, D]`` each."""
        assert self.deep is not None
        features = self.deep.read(args, kwargs)[DEEPSTACK[1]]
        return () if features is None else tuple(features)

    def told(self, kwargs: Mapping[str, Any], name: str) -> Any:
        """An argument that the text model gives every decoder layer by keyword."""
        if name not in kwargs:
            missing("the arguments of a decoder layer", name)
        return kwargs[name]

    def output_cache(self, output: Any) -> Cache | None:
        """The cache in the text model's output."""
        cache: Cache | None = attribute(output, self.cache)
        return cache

"""What one call of the model brings, read once from the host's arguments: every later part takes it from here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.errors import ModelError, NotPrunedError, check
from vlmprune.models.host.cache_view import check_cache, entries
from vlmprune.models.host.names import Arguments, missing
from vlmprune.models.host.parts import Parts
from vlmprune.models.vision_reads import VisionReads
from vlmprune.models.visuals import Visuals


class Asked(NamedTuple):
    """What a call of the outer model wants.

    Attributes:
        logits: of how many of the last rows; 0 = of all.
        predicting: ``[B, q]`` True at positions from which a label is predicted; True = from all before text; None =
            this is no training.
    """

    logits: int = 0
    predicting: Tensor | bool | None = None


def read_asked(given: dict[str, Any], training: bool) -> Asked:
    """What the outer model's arguments ask for.

    Assisted decoding appends candidates to the prefill itself, and asks for the logits of the last prompt row and of
    each of them. So does whoever rates given answers; the row that scores is the last one of the question there too.
    """
    wanted, labels = given["logits_to_keep"], given["labels"]
    predicting: Tensor | bool | None = training or None
    if labels is not None:
        predicting = pad(labels[:, 1:] != -100, (0, 1), value=False)
    return Asked(wanted if isinstance(wanted, int) else 0, predicting)


@dataclass(frozen=True)
class Call:
    """One call of the model inside a pruning scope. Positions are those of its own chunk of the prompt, 0..q-1.

    Attributes:
        batch, length: samples, and tokens of each (q).
        past: tokens the cache had seen before it, on the host.
        cache: the cache it came with, or None.
        mask: ``[B, past + q]`` the 2-D attention mask, or None.
        logits: of how many of the last rows logits are asked for, as generate() does; 0 = of all.
        predicting: ``[B, q]`` True at positions from which a label is predicted; None outside training.
        ids: ``[B, q]`` its token ids, where it came with them.
        visuals: the images and videos it brings; None without any.
        visual: ``[B, q]`` True at visual tokens, or None without any.
        videos: ``[B, q]`` True at visual tokens of a video, where it brings both kinds (one host read more).
    """

    batch: int
    length: int
    past: int = 0
    cache: Any = None
    mask: Tensor | None = None
    logits: int = 0
    predicting: Tensor | None = None
    ids: Tensor | None = None
    visuals: Visuals | None = None
    visual: Tensor | None = None
    videos: Tensor | None = None

    @cached_property
    def valid(self) -> Tensor | None:
        """``[B, past + q]`` bool, False at padding; None where there is no mask."""
        return None if self.mask is None else self.mask.bool()

    @property
    def decodes(self) -> bool:
        """Whether it is a decode step: one token, and nothing to choose from."""
        return self.length == 1 and self.visual is None

    @property
    def tail(self) -> int:
        """Candidates of assisted decoding that stand behind the prompt; more is a call that wants every row's logits."""
        return max(self.logits - 1, 0) if self.logits < self.length else 0

    def padding(self) -> Tensor | None:
        """``[B, q]`` False at padding of this chunk, or None."""
        return None if self.valid is None else self.valid[:, -self.length :]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def read_call(parts: Parts, given: Arguments, asked: Asked, vision: VisionReads, prunes: bool) -> Call:
    """Read a call that is no decode step; ``prunes``: it will be pruned, and not only measured.

    Raises:
        ModelError: a cache or samples in a form that cannot be pruned.
        NotPrunedError: nothing says where visual tokens might be.
        InputError: a mask or labels of another shape.
    """
    assert given.shape is not None
    (batch, length), cache, ids, embeds = given.shape, given.cache, given.ids, given.embeds
    past = 0 if cache is None else int(cache.get_seq_length())
    visuals, mask = vision.visuals(given), None
    if length > 1 or visuals is not None:
        static = cache is not None and cache.is_compileable
        mask = padding_mask(given.mask, entries(cache, 0, past) + length if static else None)
    call = Call(batch, length, past, cache, mask, asked.logits)
    if visuals is None:
        if ids is None and past == 0 and prunes:
            raise NotPrunedError(
                "inputs_embeds: expected input_ids or images with it, got neither: no way to find visual tokens"
            )
        return call
    if prunes:
        check_cache(cache)
        check_unpacked(given, "flash" in parts.text.config._attn_implementation)
    visual = visuals.mask(ids, embeds, *visuals.kinds)
    videos = visuals.mask(ids, embeds, "video") if len(visuals.kinds) > 1 else None
    predicting = _predicting(asked.predicting, visual)
    return replace(call, predicting=predicting, ids=ids, visuals=visuals, visual=visual, videos=videos)


def _predicting(asked: Tensor | bool | None, visual: Tensor) -> Tensor | None:
    """``[B, q]`` True at positions from which a label is predicted."""
    if isinstance(asked, Tensor):
        shape = tuple(visual.shape)
        check(asked.shape == shape, "labels", f"{shape} as the tokens", tuple(asked.shape))
        return asked.to(visual.device)
    return pad(~visual[:, 1:], (0, 1), value=False) if asked else None


def padding_mask(attention_mask: object, fixed: int | None = None) -> Tensor | None:
    """The 2-D attention mask ``[B, S]``; None if there is none. Raises InputError for a ready-made 4-D mask.

    For a cache of fixed size generate() makes the 4-D mask ahead; what its last query sees is then all that is no padding among
    the ``fixed`` entries there are.
    """
    if isinstance(attention_mask, dict):  # by kind of layer
        if "full_attention" not in attention_mask:
            missing("the attention masks by kind of layer", "full_attention")
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None:
        return None
    if fixed is not None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        seen = attention_mask[:, 0, -1, :fixed]
        return seen if seen.dtype == torch.bool else seen == 0
    ok = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    check(ok, "attention_mask", "2-D [B, S] (a ready-made mask cannot be shortened)", got)
    assert isinstance(attention_mask, Tensor)
    return attention_mask


def check_unpacked(given: Arguments, flash: bool) -> None:
    """Raise ModelError for samples packed one behind the other as one: after a stage they would see each other.

    transformers tells them by bounds, or by positions that start again where there is neither mask nor cache (with
    FlashAttention: in a batch of one), and so it is told here. One host read, which transformers makes too.
    """
    positions = given.position_ids
    if positions is not None and positions.ndim == 3:  # Qwen-VL: those of the text come first, if at all
        positions = positions[0] if len(positions) == 4 else None
    alike = given.mask is None or (flash and isinstance(given.mask, Tensor) and bool(given.mask.all()))
    again = False
    if positions is not None and alike and (given.cache is None or (flash and len(positions) == 1)):
        again = bool((positions.diff(dim=-1) != 1).any())
    if given.packed or again:
        raise ModelError(
            "position_ids: expected one sample a row in a pruning scope, got packed samples (pad them, or run them apart)"
        )

"""A clip as a strip of frames: what of each one is left after every stage. PIL only, but for where the tokens of a frame lie."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from vlmprune.models.host.families import FAMILIES
from vlmprune.models.host.views import Encoded, Shapes
from vlmprune.policies.base import Grid, tokens_in
from vlmprune.view.outcome import Outcome
from vlmprune.view.picture import CAPTION, GAP, INK, PAPER, TITLE, dim_dropped

HEIGHT, NEXT, COLUMNS = 96, 4, 16
"""Pixels of a frame's height and between two frames; how many frames stand side by side."""


class Clip(NamedTuple):
    """Where the visual tokens of a clip lie.

    Attributes:
        frames: first token and grid of every frame (Qwen-VL's are of two each).
        tokens: how many tokens there are, those of no frame among them.
    """

    frames: tuple[tuple[int, Grid], ...]
    tokens: int

    def counts(self, kept: Collection[int]) -> list[int]:
        """How many tokens of each frame are kept."""
        return [sum(n - first in range(tokens_in([grid])) for n in kept) for first, grid in self.frames]


def clip_of(config: Any, inputs: Any) -> Clip:
    """That of the one clip in these inputs, for a family with videos."""
    family = FAMILIES[config.model_type]
    assert family.videos is not None
    tokens = int((inputs["input_ids"] == config.video_token_id).sum())
    thw = inputs["video_grid_thw"].tolist() if "video_grid_thw" in inputs else None
    shapes = Shapes(config, family.side(config))
    (views,) = family.videos(shapes, [torch.empty(tokens, 0, device="meta")], Encoded(thw=thw))
    firsts = accumulate((tokens_in([view.grid]) for view in views), initial=0)
    whole = [(first, view.grid) for first, view in zip(firsts, views, strict=False) if view.crops != (0, 0)]
    return Clip(tuple(whole), tokens)


def strip(images: Sequence[Image.Image], clip: Clip, kept: Collection[int]) -> Image.Image:
    """The frames side by side, up to ``COLUMNS`` in a line, with every token dimmed whose number is not in ``kept``.

    Where one frame of tokens is made of several images, the first one is shown.
    """
    width = max(1, round(images[0].width * HEIGHT / images[0].height))
    count, across = len(clip.frames), min(COLUMNS, len(clip.frames))
    size = across * (width + NEXT) - NEXT, -(-count // across) * (HEIGHT + NEXT) - NEXT
    sheet = Image.new("RGB", size, PAPER)
    for i, (first, grid) in enumerate(clip.frames):
        image = images[i * len(images) // count].resize((width, HEIGHT), Image.Resampling.LANCZOS)
        at = i % across * (width + NEXT), i // across * (HEIGHT + NEXT)
        sheet.paste(dim_dropped(image, grid, {n - first for n in kept}), at)
    return sheet


def draw_strips(images: Sequence[Image.Image], clip: Clip, outcomes: Sequence[Outcome]) -> Image.Image:
    """One strip for every stage of each policy, under its name and answer; the whole clip first."""
    lines = [(_title("unpruned", outcomes), f"{clip.tokens} tokens", strip(images, clip, range(clip.tokens)))]
    for outcome in outcomes:
        title = f"{outcome.label}  ->  {outcome.answer}"
        for (layer, *_), kept in zip(outcome.report.stages, outcome.kept, strict=True):
            each = "/".join(map(str, clip.counts(kept)))
            caption = f"from layer {layer}: {len(kept)} of {clip.tokens}  ({each})"
            lines.append((title, caption, strip(images, clip, kept)))
            title = ""
    large, small = ImageFont.load_default(15), ImageFont.load_default(12)
    width = max(max(x.width, int(small.getlength(text)) + 1) for _, text, x in lines)
    heads = [TITLE if title else 0 for title, *_ in lines]
    tops = [
        *accumulate(
            (h + CAPTION + x.height + GAP for h, (*_, x) in zip(heads, lines, strict=True)), initial=GAP
        )
    ]
    sheet = Image.new("RGB", (width + 2 * GAP, tops[-1]), PAPER)
    pen = ImageDraw.Draw(sheet)
    for top, head, (title, caption, x) in zip(tops, heads, lines, strict=False):
        pen.text((GAP, top), title, fill=INK, font=large)
        pen.text((GAP, top + head), caption, fill=INK, font=small)
        sheet.paste(x, (GAP, top + head + CAPTION))
    return sheet


def _title(name: str, outcomes: Sequence[Outcome]) -> str:
    """The heading of the unpruned run, with its answer if there was one."""
    return "  ->  ".join([name, *[outcome.answer for outcome in outcomes if outcome.policy is None]])

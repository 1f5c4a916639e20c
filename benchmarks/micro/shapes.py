"""Where pruning happens in published models: the five prompts every case is measured at, and a tiny one for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmprune.flops import DecoderShape, causal_half_flops, decoder_flops


@dataclass(frozen=True)
class Shape:
    """One prompt with one image (or video) at the stage that prunes it.

    Attributes:
        name: model and prompt length, as the tables print it.
        model: the dimensions of the decoder.
        visual: visual tokens that enter the stage.
        keep: visual tokens that survive it.
        before: text tokens in front of the image.
        after: text tokens behind it.
    """

    name: str
    model: DecoderShape
    visual: int
    keep: int
    before: int = 35  # what stands before the image in LLaVA-1.5's prompt
    after: int = 29

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return self.before + self.visual + self.after

    @property
    def kept(self) -> int:
        """Tokens of the prompt that survive, text included."""
        return self.before + self.keep + self.after

    @property
    def prefill_flops(self) -> int:
        """FLOPs of the unpruned prefill, without the half of the scores that a causal kernel skips."""
        skipped = causal_half_flops(self.length, self.model.heads, self.model.head_dim)
        return decoder_flops(self.model, [self.length] * self.model.layers) - self.model.layers * skipped


LLAVA = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, intermediate=11008)
QWEN = DecoderShape(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944)
SMALL = DecoderShape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=128)

SHAPES = (
    Shape("llava-1.5-7b", LLAVA, 576, 64),
    Shape("llava-next-7b", LLAVA, 2880, 320),
    Shape("qwen2.5-vl-7b-4k", QWEN, 4096, 1024),
    Shape("qwen2.5-vl-7b-16k", QWEN, 16384, 2048),
    Shape("qwen2.5-vl-7b-32k", QWEN, 32768, 4096),
)
TINY = Shape("tiny", SMALL, 60, 12, before=3, after=5)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = (1, 64, 200)


@dataclass(frozen=True)
class Setting:
    """What one line of the table is measured at."""

    shape: Shape
    dtype: torch.dtype
    rows: int
    device: torch.device

    @property
    def n_rows(self) -> int:
        """Scoring rows: the last of the prompt, and no more than it has."""
        return min(self.rows, self.shape.length)

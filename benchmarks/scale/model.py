"""A LLaVA whose vision tower does no work, for prompts of any number of visual tokens; weights are random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE, WORD = 9, 5
BEFORE, AFTER = 35, 29  # text tokens around the images
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Size:
    """A decoder: width, layers, heads, width inside the feed-forward block."""

    hidden: int
    layers: int
    heads: int
    inner: int


SIZES = {
    "small": Size(256, 4, 4, 688),
    "llava-1.5-7b": Size(4096, 32, 32, 11008),
    "tiny": Size(32, 3, 2, 64),
}


class Tower:
    """In the place of the tower's forward: features of as many tokens as ``tokens`` says, drawn once."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.tokens = model, tokens
        model.model.vision_tower.forward = self

    def __call__(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        shape = len(pixel_values), 1 + self.tokens, TOWER["hidden_size"]
        draw = torch.Generator(pixel_values.device).manual_seed(0)
        states = torch.randn(shape, generator=draw, device=pixel_values.device, dtype=pixel_values.dtype)
        return BaseModelOutputWithPooling(last_hidden_state=states, hidden_states=(states,) * 3)


def make_model(size: Size, device: torch.device, dtype: torch.dtype, attention: str) -> Any:
    """The model, its weights drawn on the device."""
    torch.manual_seed(0)
    decoder = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.inner,
        vocab_size=64,
        max_position_embeddings=1 << 16,
    )
    tower = CLIPVisionConfig(**TOWER, image_size=2, patch_size=1)
    config = LlavaConfig(vision_config=tower, text_config=decoder, image_token_index=IMAGE)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def make_prompt(model: Any, tokens: int, images: int, batch: int) -> dict[str, Tensor]:
    """Text, images of ``tokens`` visual tokens with a word after each, text; the tower is told how many."""
    Tower(model, tokens)
    row = [WORD] * BEFORE + [*[IMAGE] * tokens, WORD] * images + [WORD] * AFTER
    ids = torch.tensor([row] * batch, device=model.device)
    pixels = torch.zeros(batch * images, 3, 2, 2, device=model.device, dtype=model.dtype)
    return {"input_ids": ids, "pixel_values": pixels}

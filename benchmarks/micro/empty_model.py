"""A LLaVA whose layers, vision tower and projector do no work: hooks fire as in a real one, and little else takes time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, WORD, PATCH, WIDTH, HEADS = 99, 7, 14, 32, 2


def make_model(layers: int, side: int, text: int) -> LlavaForConditionalGeneration:
    """A model for prompts of one image of ``side * side`` tokens and so many of text."""
    torch.manual_seed(0)
    sizes: dict[str, int] = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": HEADS,
    }
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=side * PATCH, patch_size=PATCH)
    decoder = LlamaConfig(**sizes, num_hidden_layers=layers, num_key_value_heads=1, vocab_size=100)
    config = LlavaConfig(
        vision_config=vision, text_config=decoder, image_token_index=IMAGE, image_seq_length=side**2
    )
    model = LlavaForConditionalGeneration(config).eval()
    _empty_tower(model, torch.zeros(1, 3, side * PATCH, side * PATCH))
    for layer in model.model.language_model.layers:
        _empty_layer(layer, side**2 + text)
    model.model.language_model.norm.forward = lambda hidden: hidden
    return model


def make_prompt(side: int, text: int) -> dict[str, Tensor]:
    """Text, an image, text."""
    before = text // 2
    ids = [1] + [WORD] * (before - 1) + [IMAGE] * side**2 + [WORD] * (text - before)
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.zeros(1, 3, side * PATCH, side * PATCH)}


@torch.no_grad()
def _empty_tower(model: Any, pixels: Tensor) -> None:
    """The tower runs once; from then on it and the projector give what they gave then."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    seen = tower(pixels, output_hidden_states=True)
    states = seen.hidden_states[-2]
    features = projector(states[:, 1:])
    read = [module for name, module in tower.named_modules() if name.endswith(("q_proj", "k_proj"))]
    for module in read:
        _give(module, states)

    def run(*args: Any, **kwargs: Any) -> Any:
        for module in read:  # methods that read the tower hook its projections
            module(states)
        return seen

    tower.forward = run
    _give(projector, features)


def _give(module: nn.Module, what: Tensor) -> None:
    module.forward = lambda *args, **kwargs: what  # type: ignore[method-assign]


def _empty_layer(layer: Any, length: int) -> None:
    """A decoder layer that only calls its attention, and that only fills the cache."""
    attn = layer.self_attn
    keys = torch.zeros(1, 1, length, attn.head_dim)

    def attend(hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        n = hidden_states.shape[1]
        if n > 1 and past_key_values is not None:  # decode steps leave the cache as long as it is
            past_key_values.update(keys[:, :, :n], keys[:, :, :n], attn.layer_idx)
        return hidden_states, None

    attn.forward = attend
    layer.forward = lambda hidden_states, **kwargs: layer.self_attn(hidden_states=hidden_states, **kwargs)[0]

"""What the hooks of a pruning scope cost a decode step: Python time only, the decoder layers themselves do nothing here.

Lines of one group differ by the hooks alone. Divide the difference by the number of hooked layers (``extra_info``).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vlmprune

LAYERS, IMAGE = 32, 99
POLICIES = {"unpruned": None, "pruned": vlmprune.FastV(layer=2, keep=0.5)}


class Ops(TorchDispatchMode):
    """Names of the tensor operations that ran inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def make_model() -> LlavaForConditionalGeneration:
    """LLaVA-1.5's depth, nothing of its width."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=100
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16)
    return LlavaForConditionalGeneration(config).eval()


def make_step(model: Any, padded: bool) -> dict[str, Any]:
    """A prefilled cache and the next token: one sample, or two of unequal length with the shorter one padded."""
    ids = torch.tensor([[1, *[IMAGE] * 16, 5, 6], [0, 0, 0, *[IMAGE] * 16]][: 1 + padded])
    mask, cache = (ids != 0).long(), DynamicCache()
    pixels = torch.zeros(len(ids), 3, 56, 56)
    model(input_ids=ids, attention_mask=mask, pixel_values=pixels, past_key_values=cache)
    return {
        "input_ids": torch.full((len(ids), 1), 7),
        "attention_mask": torch.cat([mask, mask.new_ones(len(ids), 1)], 1),
        "position_ids": mask.sum(1, keepdim=True),
        "past_key_values": cache,
    }


def decode_ops(model: Any, step: dict[str, Any]) -> list[str]:
    """The tensor operations of one whole decode step."""
    with Ops() as ops:
        model(**step)
    return ops.names


def pass_through(hidden: Tensor, **kwargs: Any) -> Tensor:
    """In place of a decoder layer."""
    return hidden


@torch.no_grad()
@pytest.mark.parametrize("provider", POLICIES)
@pytest.mark.parametrize("padded", [False, True], ids=["one", "padded"])
def test_decode_overhead(benchmark: Any, provider: str, padded: bool) -> None:
    model, policy = make_model(), POLICIES[provider]
    plain = decode_ops(model, make_step(model, padded))
    with nullcontext() if policy is None else vlmprune.prune(model, policy):
        step = make_step(model, padded)
        ops = decode_ops(model, make_step(model, padded))
        assert padded or ops == plain, (
            "a decode step of one sample takes the operations of an unpruned one, no more"
        )
        for layer in model.model.language_model.layers:
            layer.forward = pass_through
        benchmark.group = (
            f"decode step through {LAYERS} empty layers, {'padded batch' if padded else 'one sample'}"
        )
        benchmark.extra_info["hooked_layers"] = 0 if policy is None else LAYERS - policy.layer + 1
        benchmark.extra_info["tensor_operations_more"] = len(ops) - len(plain)
        benchmark(lambda: model(**step))

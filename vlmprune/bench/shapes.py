"""Models of published sizes with random weights, drawn on the device: speed does not depend on what the weights are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
)

from vlmprune.bench.prompts import Prompt
from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError, check_known
from vlmprune.models import check_config

SEED = 0


@dataclass(frozen=True)
class Shape:
    """A model, its usual prompt, and policies for it.

    Attributes:
        about: what ``--help`` and the documentation say of it.
        config: makes the configuration.
        prompt: one sample; ``images`` and ``grid`` are of the size that is named in ``about``.
        policies: what is run if nothing is asked for.
    """

    about: str
    config: Callable[[], Any]
    prompt: Prompt
    policies: tuple[str, ...]


def _llama(hidden: int, layers: int, heads: int, inner: int, vocab: int = 32064) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=8192,
    )


def _clip(hidden: int, layers: int, heads: int, inner: int, side: int = 336) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        image_size=side,
        patch_size=14,
    )


def _llava(text: LlamaConfig, tower: CLIPVisionConfig) -> LlavaConfig:
    patches = (tower.image_size // tower.patch_size) ** 2
    last = text.vocab_size - 1
    return LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=last, image_seq_length=patches
    )


def _llava_7b() -> LlavaConfig:
    return _llava(_llama(4096, 32, 32, 11008), _clip(1024, 24, 16, 4096))


def _qwen2_5_7b() -> Qwen2_5_VLConfig:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision)


def _qwen3_4b() -> Qwen3VLConfig:
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    text = {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
        "rope_parameters": rope,
    }
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    vision["deepstack_visual_indexes"] = [5, 11, 17]  # type: ignore[assignment]
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


_LLAVA = ("fastv:layer=2,keep=64", "feather:layers=8/16,keep=0.22", "fastervlm:keep=64")
_NEXT = ("fastv:layer=2,keep=64", "fastervlm:keep=64", "divprune:keep=64")
SHAPES = {
    "llava-1.5-7b": Shape("576 visual tokens", _llava_7b, Prompt(), _LLAVA),
    "llava-1.5-13b": Shape(
        "576 visual tokens",
        lambda: _llava(_llama(5120, 40, 40, 13824), _clip(1024, 24, 16, 4096)),
        Prompt(),
        _LLAVA,
    ),
    # The published 2,880: five crops, as LLaVA-NeXT cuts an image of 672 x 672, without its 48 newline tokens.
    "llava-next-7b": Shape(
        "2,880 visual tokens: five crops of 336 x 336", _llava_7b, Prompt(images=5), _NEXT
    ),
    "qwen2.5-vl-7b-4k": Shape(
        "4,096 visual tokens", _qwen2_5_7b, Prompt(grid=(64, 64)), ("fastv:layer=2,keep=0.25",)
    ),
    "qwen2.5-vl-7b-16k": Shape(
        "16,384 visual tokens", _qwen2_5_7b, Prompt(grid=(128, 128)), ("fastv:layer=2,keep=0.125",)
    ),
    "qwen3-vl-4b": Shape(
        "1,024 visual tokens", _qwen3_4b, Prompt(grid=(32, 32)), ("fastv:layer=3,keep=0.25",)
    ),
    "cpu": Shape(
        "576 visual tokens, 16 layers of 1,024: for two CPU cores",
        lambda: _llava(_llama(1024, 16, 16, 2816), _clip(256, 4, 4, 1024)),
        Prompt(),
        ("fastv:layer=2,keep=0.25", "feather:layers=4/8,keep=0.22", "divprune:keep=0.25"),
    ),
    "tiny": Shape(
        "16 visual tokens, six layers of 64: to try a command; its times mean nothing",
        lambda: _llava(_llama(64, 6, 4, 128, vocab=100), _clip(32, 3, 2, 64, side=56)),
        Prompt(),
        ("fastv:layer=2,keep=4", "fastervlm:keep=4"),
    ),
}


class FullSize(Checkpoint):
    """A checkpoint of a published size whose weights are random; it has no processor.

    >>> FullSize("tiny", device="cpu").config.text_config.num_hidden_layers
    6
    """

    def __init__(
        self, shape: str, device: str = "auto", dtype: str = "auto", attention: str = "sdpa"
    ) -> None:
        """Note what to make.

        Args:
            shape: one of ``SHAPES``.
            device, attention: as for a ``Checkpoint``.
            dtype: one of ``vlmprune.checkpoints.DTYPES``; "auto" = bfloat16 on a GPU, float32 on a CPU.

        Raises:
            InputError: another shape, and as for a ``Checkpoint``.
        """
        check_known(shape, SHAPES, "shape")
        super().__init__(shape, device, dtype, attention)
        self.shape = SHAPES[shape]
        if dtype == "auto":
            self._dtype = "bfloat16" if self.device.startswith("cuda") else "float32"

    @cached_property
    def config(self) -> Any:
        """The configuration of this size."""
        config = self.shape.config()
        check_config(config)
        return config

    @property
    def processor(self) -> Any:
        """Raises InputError: there is none."""
        raise InputError(f"checkpoint: expected one with a processor, got the shape {self.source!r}")

    @cached_property
    def model(self) -> Any:
        """The model, its weights drawn where it runs, in evaluation mode."""
        torch.manual_seed(SEED)
        dtype = getattr(torch, self._dtype)
        with torch.device(self.device):
            model = AutoModelForImageTextToText.from_config(
                self.config, dtype=dtype, attn_implementation=self.attention
            )
        return model.eval()

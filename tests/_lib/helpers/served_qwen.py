"""Tiny random Qwen2.5-VLs and Qwen3-VLs with tokenizer and processor, saved as transformers saves them; and requests to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from helpers.served import Asked

WORDS = 180
MARKS = ("<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PAD, EOS, START, END, IMAGE, VIDEO = range(len(MARKS))
PIXELS = {"shortest_edge": 4 * 16**2, "longest_edge": 80 * 16**2}
"""From 4 to 80 visual tokens per image; each shows 16 pixels a side."""

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "vocab_size": len(MARKS) + WORDS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
TOWER = {
    "depth": 4,
    "num_heads": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_size": 64,
    "out_hidden_size": 128,
    "intermediate_size": 96,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
NAMES = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}


def config_of(kind: str) -> Any:
    """Windows of two tokens a side and two blocks without in Qwen2.5-VL; two features for the first decoder layers in Qwen3-VL."""
    if kind == "qwen2_5_vl":
        tower = TOWER | {"window_size": 32, "fullatt_block_indexes": [1, 3]}
        text = TEXT | {"rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}}
    else:
        tower = TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
        rope = ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        text = TEXT | {"head_dim": 32, "rope_parameters": rope}
    return getattr(hf, f"{NAMES[kind]}Config")(
        vision_config=tower,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


def saved(kind: str, folder: Path) -> Path:
    """Write such a checkpoint."""
    torch.manual_seed(0)
    model = getattr(hf, f"{NAMES[kind]}ForConditionalGeneration")(config_of(kind)).eval()
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    processor_of(kind).save_pretrained(folder)
    return folder


def processor_of(kind: str) -> Any:
    """Of words w0, w1, ... and pictures cut into patches of 8 pixels."""
    words = [*MARKS, *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=MARKS[PAD],
        eos_token=MARKS[EOS],
        extra_special_tokens=dict(
            zip(
                ("vision_bos_token", "vision_eos_token", "image_token", "video_token"),
                MARKS[START:],
                strict=True,
            )
        ),
    )
    sizes = {"size": PIXELS, "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    videos = "Qwen3VLVideoProcessor" if kind == "qwen3_vl" else "Qwen2VLVideoProcessor"
    return getattr(hf, f"{NAMES[kind]}Processor")(
        image_processor=hf.Qwen2VLImageProcessor(**sizes),
        tokenizer=fast,
        video_processor=getattr(hf, videos)(**sizes),
        chat_template="{{ messages }}",
    )


def picture(height: int, width: int, seed: int = 0) -> Any:
    """Random colours in blocks of 16 pixels: ``height x width`` visual tokens, within the processor's bounds."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
    grain = torch.randint(64, (height * 16, width * 16, 3), generator=generator, dtype=torch.uint8)
    whole = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1) // 2 + grain
    return Image.fromarray(whole.numpy())


def asked(*parts: Any, seed: int = 0) -> Asked:
    """A request: a number is so many words, a pair a picture of so many tokens a side."""
    generator = torch.Generator().manual_seed(seed)
    text, images = "", []
    for part in parts:
        if isinstance(part, int):
            text += "".join(f" w{i}" for i in torch.randint(WORDS, (part,), generator=generator).tolist())
        else:
            text += f"{MARKS[START]}{MARKS[IMAGE]}{MARKS[END]}"
            images.append(picture(*part, seed=seed + len(images)))
    return Asked(text, tuple(images))

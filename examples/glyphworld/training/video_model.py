"""The LLaVA-OneVision that watches clips: the parts of a LLaVA that looks at pictures, more words, the same template.

The processor's files are written without transformers' video processor, which wants torchvision: training does without.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoTokenizer,
    BatchFeature,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from world.video_words import CLIP_TOKEN_ID, CLIP_VOCABULARY, VIDEO
from world.videos import CELLS, FRAMES, SIDE

from training.model import CONTEXT, IMAGE, PATCH

TOKENS = FRAMES * CELLS**2 + 1  # visual tokens of a clip, a newline at the end
_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")  # a row a word
_WORD_STD = {_TABLES[0]: 0.5, _TABLES[1]: 0.02}  # of new rows
CLIP_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }} USER: {% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'video') %}<{{ c['type'] }}> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def watching(seeing: LlavaForConditionalGeneration, attention: str) -> LlavaOnevisionForConditionalGeneration:
    """A float32 model for clips with the weights of ``seeing``; what is new in it, words and the newline, is random."""
    text = copy.deepcopy(seeing.config.text_config)
    text.vocab_size = len(CLIP_VOCABULARY)
    config = LlavaOnevisionConfig(
        vision_config=copy.deepcopy(seeing.config.vision_config),
        text_config=text,
        image_token_index=CLIP_TOKEN_ID[IMAGE],
        video_token_index=CLIP_TOKEN_ID[VIDEO],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # CLIP's first state is no patch
        image_grid_pinpoints=[[SIDE, SIDE]],
        attn_implementation=attention,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    weights = {name: weight.float() for name, weight in seeing.state_dict().items()}
    for name in _TABLES:
        new = len(CLIP_VOCABULARY) - len(weights[name])
        weights[name] = torch.cat([weights[name], torch.randn(new, text.hidden_size) * _WORD_STD[name]])
    missing, spare = model.load_state_dict(weights, strict=False)
    assert missing == ["model.image_newline"] and not spare, (missing, spare)
    nn.init.normal_(model.model.image_newline, std=text.hidden_size**-0.5)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, as for pictures."""
    words = Tokenizer(models.WordLevel(CLIP_TOKEN_ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        model_max_length=CONTEXT,
        padding_side="left",
    )
    tokenizer.chat_template = CLIP_TEMPLATE
    return tokenizer


def save_processor(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write what ``AutoProcessor`` loads: the tokenizer, the template, and how images and videos are prepared."""
    pixels = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }
    images = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": [[SIDE, SIDE]],
        "do_pad": True,
    }
    videos = {"video_processor_type": "LlavaOnevisionVideoProcessor", "do_sample_frames": False}
    settings = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_processor": pixels | images,
        "video_processor": pixels | videos,
        "image_token": IMAGE,
        "video_token": VIDEO,
        "num_image_tokens": (SIDE // PATCH) ** 2 + 1,  # with the state that is no patch
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_select_strategy": "default",
    }
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CLIP_TEMPLATE)
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


class ClipProcessor:
    """What training and scoring need of the checkpoint's processor, without torchvision."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.video_token_id = CLIP_TOKEN_ID[VIDEO]

    @classmethod
    def from_pretrained(cls, folder: Path) -> ClipProcessor:
        """That of a checkpoint."""
        return cls(AutoTokenizer.from_pretrained(folder))

    def save_pretrained(self, folder: Path) -> None:
        """Write what transformers' own processor loads."""
        save_processor(self.tokenizer, folder)

    def apply_chat_template(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        """The prompt as text, one placeholder a clip."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def __call__(self, texts: Sequence[str], clips: Sequence[NDArray[np.uint8]]) -> BatchFeature:
        """The model's inputs for prompts about one clip ``[8, 112, 112, 3]`` each."""
        full = [text.replace(VIDEO, VIDEO * TOKENS) for text in texts]
        inputs = self.tokenizer(full, padding=True, return_tensors="pt", add_special_tokens=False)
        return BatchFeature({**inputs, "pixel_values_videos": pixels(torch.from_numpy(np.stack(clips)))})


def pixels(clips: torch.Tensor) -> torch.Tensor:
    """What the tower takes, ``[B, 8, 3, 112, 112]`` in -1..1, of ``clips [B, 8, 112, 112, 3]`` uint8."""
    return (clips.permute(0, 1, 4, 2, 3) / 127.5 - 1).contiguous()

"""The LLaVA to train and its processor: transformers' own classes, nothing to convert afterwards."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from world.words import TOKEN_ID, VOCABULARY

from training.batches import PATCH

CONTEXT = 1024
IMAGE = "<image>"
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }} USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_model(side: int, attention: str, layers: tuple[int, int] = (4, 8)) -> LlavaForConditionalGeneration:
    """Random float32 weights: CLIP tower of 4 x 192, Llama decoder of 8 x 256 (``layers``: of the two), 128 words."""
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=layers[1],
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=TOKEN_ID["<bos>"],
        eos_token_id=TOKEN_ID["<eos>"],
        pad_token_id=TOKEN_ID["<pad>"],
        tie_word_embeddings=False,
    )
    model = assemble(make_tower(side, layers[0]), text, TOKEN_ID[IMAGE], attention)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    return model


def make_tower(side: int, layers: int = 4) -> CLIPVisionConfig:
    """The CLIP tower for pictures of ``side`` pixels."""
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=6,
        image_size=side,
        patch_size=PATCH,
        projection_dim=192,
    )


def assemble(
    tower: CLIPVisionConfig, text: PreTrainedConfig, image_token: int, attention: str
) -> LlavaForConditionalGeneration:
    """A LLaVA of these parts, in float32.

    Every matrix starts with unit gain; the last one of every block is zero, so that a deep model starts as a shallow one.
    """
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(tower.image_size // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        attn_implementation=attention,
    )
    model = LlavaForConditionalGeneration(config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if name.endswith(("out_proj", "fc2", "o_proj", "down_proj")):
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def enlarge(model: LlavaForConditionalGeneration, side: int) -> LlavaForConditionalGeneration:
    """A copy of ``model`` for pictures of ``side`` pixels: position embeddings interpolated, everything else the same."""
    config = copy.deepcopy(model.config)
    old, new = config.vision_config.image_size // PATCH, side // PATCH
    config.vision_config.image_size, config.image_seq_length = side, new**2
    weights = model.state_dict()
    (name,) = [key for key in weights if key.endswith("position_embedding.weight")]
    cls, grid = weights[name].split([1, old**2])
    grid = F.interpolate(grid.T.reshape(1, -1, old, old), (new, new), mode="bicubic", align_corners=False)
    weights[name] = torch.cat([cls, grid.flatten(2)[0].T])
    larger = LlavaForConditionalGeneration(config)
    larger.load_state_dict(weights)
    return larger


def make_processor(side: int, tokenizer: PreTrainedTokenizerBase | None = None) -> LlavaProcessor:
    """Tokenizer (of whole words, unless given), image processor for pictures of ``side`` pixels, chat template."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer if tokenizer is not None else _words(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def _words() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=CONTEXT,
        padding_side="left",
    )

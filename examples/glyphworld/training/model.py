"""The small LLaVA and its processor, made from nothing: transformers' own classes, nothing to convert afterwards."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from world.words import TOKEN_ID, VOCABULARY

from training.batches import PATCH

CONTEXT = 1024
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<bos> USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'][0]['text'] + ' <eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_model(side: int, attention: str, layers: tuple[int, int] = (4, 8)) -> LlavaForConditionalGeneration:
    """Random float32 weights: CLIP tower of 4 x 192, Llama decoder of 8 x 256 (``layers``: of the two), 128 words."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=layers[0],
        num_attention_heads=6,
        image_size=side,
        patch_size=PATCH,
        projection_dim=192,
    )
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
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_ID["<image>"],
        image_seq_length=(side // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        attn_implementation=attention,
    )
    model = LlavaForConditionalGeneration(config)
    _start(model)
    return model


def _start(model: LlavaForConditionalGeneration) -> None:
    """Initial weights of unit gain; the last matrix of every block is zero, so that a deep model starts as a shallow one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if name.endswith(("out_proj", "fc2", "o_proj", "down_proj")):
                nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.5)


def make_processor(side: int) -> LlavaProcessor:
    """Tokenizer of whole words, image processor for pictures of ``side`` pixels, chat template."""
    words = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=CONTEXT,
        padding_side="left",
    )
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )

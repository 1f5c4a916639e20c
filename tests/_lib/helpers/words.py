"""A tokenizer of whole words for the tiny models: id 17 is "w17", and a chat template with turns."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from helpers.tiny import BOS, EOS, IMAGE, PAD

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w90 {% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% else %}w91 {{ m['content'][0]['text'] }} </s> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}w91{% endif %}"
)
USER, ASSISTANT, BLANK, CLOSE, OPEN = 90, 91, 92, 93, 94
"""Words with a part: whose turn it is, a line end, and what stands behind and in front of an image."""


def make_tokenizer(size: int = 200, template: str | None = TEMPLATE) -> Any:
    """Words w3, w4, ...; ``BLANK`` is a line end, ``CLOSE`` and ``OPEN`` are special."""
    names = {
        PAD: "<pad>",
        BOS: "<s>",
        EOS: "</s>",
        IMAGE: "<image>",
        BLANK: "\n",
        CLOSE: "</img>",
        OPEN: "<img>",
    }
    vocabulary = {names.get(i, f"w{i}"): i for i in range(size)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **special, clean_up_tokenization_spaces=False)
    made.add_special_tokens({"additional_special_tokens": ["<image>", "</img>", "<img>"]})
    made.chat_template = template
    return made

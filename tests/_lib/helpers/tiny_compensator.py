"""Captioner, selector and describer small enough for tests, weights at random, and what they are shown."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vlmprune.compensation import Captioner, Describer, Discarded, Selector

WORDS = [
    "is",
    "the",
    "a",
    "red",
    "green",
    "blue",
    "cat",
    "dog",
    "phone",
    "cup",
    "left",
    "right",
    "of",
    "what",
    "where",
    "colour",
    ".",
    ":",
    "Question",
    "Supplemental",
]
FEATURES = 24
WIDTH = 16


def tokenizer(ends=False):
    """One token a word; ``ends``: an end after each text, where CLIP's encoder reads what the text is about."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        made.post_processor = processors.TemplateProcessing("$A <eos>", None, [("<eos>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **special)


def language_model(kind="gpt2", context=64, size=23, **settings):
    """Weights large enough that captions differ between images."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.6} | settings
    if kind == "gpt2":
        config = GPT2Config(vocab_size=size, n_positions=context, n_embd=WIDTH, n_layer=2, n_head=2, **ends)
        return GPT2LMHeadModel(config).eval()
    shape = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=size, max_position_embeddings=context, **shape, **heads, **ends)
    return LlamaForCausalLM(config).eval()


def captioner(kind="gpt2", context=64, **settings):
    model = language_model(kind, context)
    settings = {"prefix": 4, "heads": 2, "max_new_tokens": 8} | settings
    torch.manual_seed(1)
    return Captioner.make(FEATURES, model, tokenizer(), **settings).eval()


def text_encoder(context=32):
    torch.manual_seed(2)
    shape = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        max_position_embeddings=context,
        **shape,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        initializer_factor=20.0,
    )
    return CLIPTextModel(config).eval()


def selector(encoder=None, **settings):
    encoder = encoder or text_encoder()
    torch.manual_seed(3)
    return Selector.make(encoder, tokenizer(ends=True), **{"heads": 2, **settings}).eval()


def describer(kind="gpt2"):
    return Describer(captioner(kind), selector()).eval()


def image(dropped, question="what is the red cat", tokens=12, seed=0):
    """One of ``tokens`` tokens, of which the first ``dropped`` odd places (then even ones) are dropped."""
    made = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, FEATURES, generator=made)
    order = [*range(1, tokens, 2), *range(0, tokens, 2)]
    return Discarded(features, torch.tensor(sorted(order[:dropped]), dtype=torch.long), question)


def images():
    """Of different numbers of dropped tokens, none among them, and questions of different lengths."""
    return [
        image(7, "what", seed=1),
        image(0, "where is the blue dog left of the cup", seed=2),
        image(12, "colour of the phone", seed=3),
        image(3, "is the green cup right of the cat", seed=4),
    ]

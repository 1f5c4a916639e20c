"""A small pretrained decoder to train from."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world.words import VOCABULARY


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Folder of a random Llama with grouped heads, tied words and a byte-level tokenizer: a small pretrained decoder."""
    folder = tmp_path_factory.mktemp("llama")
    text = Tokenizer(models.BPE())
    text.pre_tokenizer, text.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special, alphabet = ["</s>", "<s>"], pre_tokenizers.ByteLevel.alphabet()
    known = [word for word in VOCABULARY if word.isalpha()]
    text.train_from_iterator(
        [" ".join(known)] * 2,
        trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder

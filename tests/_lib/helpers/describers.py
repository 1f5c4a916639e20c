"""A tiny describer for the small trained model in examples/, weights at random, and questions to train it on."""

import json
import shutil

import torch
from transformers import AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from helpers.command_line import CHECKPOINT, SCENE
from vlmprune.compensation import Captioner, Describer, Selector

FEATURES, WIDTH = 256, 16
"""Of the example's visual tokens, and of the describer."""


def make_parts(features: int = FEATURES) -> tuple[Captioner, Selector]:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape = {"n_positions": 64, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends)).eval()
        small = {"prefix": 3, "layers": 1, "heads": 2, "max_new_tokens": 5}
        captioner = Captioner.make(features, model, tokenizer, **small)
        shape = {
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        encoder = BertModel(
            BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **shape, pad_token_id=0)
        )
        selector = Selector.make(encoder.eval(), tokenizer, heads=2, layers=1, train_text_encoder=True)
    return captioner, selector


def make_describer(features: int = FEATURES, chooses: bool = True) -> Describer:
    captioner, selector = make_parts(features)
    return Describer(captioner, selector if chooses else None).eval()


def write_data(folder, count: int = 7):
    """So many questions about the first scenes of the example, the first half with bare questions; returns the file."""
    folder.mkdir(exist_ok=True)
    lines = []
    for entry in json.loads((SCENE.parent / "questions.json").read_text())[:2]:
        shutil.copy(SCENE.parent / entry["image"], folder)
        for asked in entry["qa"]:
            bare = asked["prompt"].removeprefix("<bos> USER: <image> ").removesuffix(" ASSISTANT:")
            question = {"question": bare} if len(lines) < count // 2 else {"prompt": asked["prompt"]}
            lines.append(question | {"image": entry["image"], "answer": asked["answer"]})
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines[:count])))
    return file

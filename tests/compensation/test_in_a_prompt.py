"""The describer within a pruned run: a batch of images of a model, from a folder, its cost in the report."""

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

import vlmprune
from helpers import tiny_compensator as tiny
from helpers.tiny import BOS, GRID, IMAGE, PAD, generate, make_model
from helpers.words import ASSISTANT, BLANK, USER, make_tokenizer
from vlmprune.compensation import Captioner, Describer, Selector

WORDS = make_tokenizer()


def describer(width):
    """One that writes and reads words of the model's own tokenizer (of unknown ones, all candidates would be alike)."""
    torch.manual_seed(5)
    decoder = tiny.language_model(size=len(WORDS), bos_token_id=BOS, eos_token_id=2)
    captioner = Captioner.make(width, decoder, WORDS, prefix=4, heads=2, max_new_tokens=5)
    shape = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "initializer_range": 0.5}
    encoder = DistilBertModel(DistilBertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **shape))
    return Describer(captioner, Selector.make(encoder, WORDS, heads=2)).eval()


def accm(compensator):
    selection = vlmprune.FasterVLM(keep=4, positions="pack")
    return vlmprune.ACCM(selection, compensator, keep=None, candidates=3, wording="w60 {}", tokenizer=WORDS)


def batch():
    rows = [[BOS, USER, *[IMAGE] * GRID**2, BLANK, *question, ASSISTANT] for question in ([5, 6, 7], [8])]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    pixels = torch.randn(2, 3, 14 * GRID, 14 * GRID, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


def run_of(model, compensator):
    with vlmprune.prune(model, accm(compensator)) as run:
        _, logits, _ = generate(model, batch(), 3)
    return logits, run


def test_the_describer_in_a_pruned_run(tmp_path):
    model = make_model()
    made = describer(64)
    logits, run = run_of(model, made)
    said = [sample[0] for sample in run.inserted.captions]
    assert all(len(caption.candidates) == 3 and caption.text in caption.candidates for caption in said)
    assert said[0].text != said[1].text
    assert run.report().flops.captions == sum(caption.flops for caption in said) > 0

    known, _ = run_of(model, vlmprune.compensation.Known([caption.text for caption in said]))
    assert torch.equal(logits, known)

    made.save_pretrained(tmp_path / "made")
    loaded, _ = run_of(model, str(tmp_path / "made"))
    assert torch.equal(logits, loaded)


def test_one_made_for_another_model_is_an_error():
    message = r"features: expected \[tokens, 48\], as the captioner was made for, got \[16, 64\]"
    with pytest.raises(vlmprune.InputError, match=message):
        run_of(make_model(), describer(48))


def test_what_a_killed_save_left_is_opened(tmp_path):
    """The folder of a policy, as well as that of load_compensator."""
    describer(64).save_pretrained(tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "made.old")
    _, run = run_of(make_model(), str(tmp_path / "made"))
    assert run.report().flops.captions > 0

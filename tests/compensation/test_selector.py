"""The selector: equivariance, padding, pooling, truncation, what is frozen, FLOPs as counted."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from helpers import tiny_compensator as tiny
from vlmprune.compensation import Selector
from vlmprune.errors import InputError

QUESTIONS = ["what is the red cat", "where", "colour of the phone left of the cup"]
TEXTS = [
    ["a red cat", "", "the dog"],
    ["left of the blue cup .", "right", "cat"],
    ["blue", "red", "green phone"],
]


def without_pooler(**settings):
    shape = {"dim": tiny.WIDTH, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "initializer_range": 0.5}
    torch.manual_seed(4)
    return DistilBertModel(DistilBertConfig(vocab_size=23, max_position_embeddings=32, **shape)).eval()


ENCODERS = pytest.mark.parametrize("encoder", [tiny.text_encoder, without_pooler])


@ENCODERS
def test_candidates_have_no_order(encoder):
    selector = tiny.selector(encoder())
    order = [2, 0, 1]
    logits = selector(QUESTIONS, TEXTS)
    assert logits.shape == (3, 3) and (logits.std(dim=1) > 1e-3).all()
    turned = selector(QUESTIONS, [[texts[i] for i in order] for texts in TEXTS])
    torch.testing.assert_close(turned, logits[:, order])


@ENCODERS
def test_a_batch_gives_what_each_question_gives_alone(encoder):
    selector = tiny.selector(encoder())
    alone = [selector([q], [texts]) for q, texts in zip(QUESTIONS, TEXTS, strict=True)]
    torch.testing.assert_close(selector(QUESTIONS, TEXTS), torch.cat(alone))


def test_candidates_are_compared_with_one_another():
    selector = tiny.selector()
    first = selector(["what"], [["cat", "dog"]])[0, 0]
    assert (first - selector(["what"], [["cat", "the blue phone"]])[0, 0]).abs() > 1e-4


def test_the_mean_is_over_real_tokens():
    encoder = without_pooler()
    selector = tiny.selector(encoder)
    tokens = selector.tokenizer(["a red cat", "a"], padding=True, return_tensors="pt")
    encoded = selector._encoded(tokens)
    assert tokens["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    short = selector.tokenizer(["a"], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(encoded[1], encoder(input_ids=short).last_hidden_state[0].mean(0))


def test_it_reads_question_and_caption_in_the_papers_words():
    seen = []
    selector = tiny.selector()
    tokenizer = selector.tokenizer
    selector.tokenizer = lambda texts, **how: seen.extend(texts) or tokenizer(texts, **how)
    selector.tokenizer.model_max_length = 32
    selector(["what"], [["cat", "dog"]])
    assert seen[0] == "Question: what  Supplemental information for questions: cat" and len(seen) == 2


def test_long_texts_lose_their_end():
    selector = tiny.selector()  # context of 32 tokens
    long = "cat " * 30
    torch.testing.assert_close(
        selector(["what"], [[long, "dog"]]), selector(["what"], [[long + "dog", "dog"]])
    )


def test_the_text_encoder_is_frozen_unless_asked():
    selector = tiny.selector().train()
    assert not selector.text_encoder.training and selector.blocks[0].training
    selector(QUESTIONS, TEXTS).sum().backward()
    trained = {name for name, weight in selector.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in selector.named_parameters() if not name.startswith("text_encoder")}

    selector = tiny.selector(train_text_encoder=True).train()
    assert selector.text_encoder.training
    selector(QUESTIONS, TEXTS).sum().backward()
    assert any(weight.grad is not None for weight in selector.text_encoder.parameters())


def test_dropout_while_training_only():
    selector = tiny.selector(dropout=0.5)
    assert torch.equal(selector(QUESTIONS, TEXTS), selector(QUESTIONS, TEXTS))
    selector.train()
    assert not torch.equal(selector(QUESTIONS, TEXTS), selector(QUESTIONS, TEXTS))


@ENCODERS
def test_flops_are_those_that_run(encoder):
    selector = tiny.selector(encoder())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, flops = selector.judge(QUESTIONS, TEXTS)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_bad_input():
    selector = tiny.selector()
    with pytest.raises(InputError, match="candidates: expected one list for each of 2 questions, got 1"):
        selector(["what", "where"], [["cat"]])
    with pytest.raises(InputError, match=r"candidates: expected as many for each question, got \[1, 2\]"):
        selector(["what", "where"], [["cat"], ["cat", "dog"]])
    with pytest.raises(InputError, match="question: expected words, got ''"):
        selector([""], [["cat"]])
    with pytest.raises(InputError, match="tokenizer: expected the text encoder's tokenizer, got None"):
        Selector.make(tiny.text_encoder())
    padless = tiny.tokenizer()
    padless.pad_token = None
    with pytest.raises(InputError, match="tokenizer: expected one with a padding token, got None"):
        Selector.make(tiny.text_encoder(), padless)


@ENCODERS
def test_save_and_load(tmp_path, encoder):
    selector = tiny.selector(encoder())
    selector.save_pretrained(tmp_path)
    loaded = Selector.from_pretrained(tmp_path)
    kept = loaded.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in selector.state_dict().items())
    # Weights that are read from a file may lie otherwise in memory, and be summed in another order.
    torch.testing.assert_close(loaded(QUESTIONS, TEXTS), selector(QUESTIONS, TEXTS))
    assert not any(weight.requires_grad for weight in loaded.text_encoder.parameters())


def test_an_encoder_that_could_not_be_loaded_again():
    """Its configuration would make a pooler, for which no weights would have been saved."""
    shape = {
        "hidden_size": tiny.WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    encoder = BertModel(BertConfig(vocab_size=23, **shape), add_pooling_layer=False)
    with pytest.raises(
        InputError, match=r"^text_encoder: expected the weights of a BertModel .*, got \['pooler"
    ):
        Selector.make(encoder, tiny.tokenizer())

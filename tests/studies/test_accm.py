"""The rival of captions: logits rectified by how many tokens a kept one stands for."""

from pathlib import Path

import pytest
import torch
from accm.rectify import _decode, answer_rectified, multiplicities
from accuracy import full_prompt, questions_of
from training.model import make_model
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlmprune import Uniform, prune

CHECKPOINT = Path(__file__).parents[2] / "examples/glyphworld/checkpoint"


@pytest.fixture(scope="module")
def asked():
    """Return model, processor and the inputs of three questions of unequal length."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    some = list(questions_of(70003, 112))[:3]
    prompts = [full_prompt(processor, entry["prompt"]) for _, entry in some]
    images = [image for image, _ in some]
    inputs = processor(
        text=prompts, images=images, padding=True, return_tensors="pt", add_special_tokens=False
    )
    return model, processor, inputs


def test_multiplicities_by_hand():
    features = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 2.0], [1.0, 5.0], [0.0, 1.0]])
    assert multiplicities(features, torch.tensor([0, 2])).tolist() == [2, 3]


def test_every_kept_token_stands_for_itself():
    counts = multiplicities(torch.ones(6, 4), torch.tensor([1, 4]))  # all alike
    assert counts.sum() == 6 and counts.min() >= 1


@pytest.mark.parametrize("keep", [20, 196])
def test_without_rectifying_it_is_pruning(asked, keep):
    """Plain: the same answers as vlmprune's; with all tokens kept, rectifying changes nothing."""
    model, processor, inputs = asked
    with prune(model, Uniform(layer=0, keep=keep)) as run:
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        kept = [run.kept_at(0, sample).tolist() for sample in range(3)]
    new = [
        processor.tokenizer.decode(row, skip_special_tokens=True)
        for row in out[:, inputs["input_ids"].shape[1] :]
    ]
    end = processor.tokenizer.eos_token_id
    plain = answer_rectified(model, inputs, kept, end, 8, rectify=False)
    assert [processor.tokenizer.decode(row) for row in plain] == [text.strip() for text in new]
    if keep == 196:
        assert answer_rectified(model, inputs, kept, end, 8) == plain


def test_rectified_keys_count_as_often_as_they_stand_for():
    """One layer deep, where keys and values are those of the embeddings: log m on a key is the key m times."""
    torch.manual_seed(0)
    model = make_model(112, "eager", layers=(1, 1)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    torch.nn.init.normal_(model.model.language_model.layers[0].self_attn.o_proj.weight, std=0.5)
    embeds, counts = torch.randn(64, 6, 256), torch.tensor([1, 4, 1, 2, 1, 1])
    places, real = torch.arange(6).expand(64, -1), torch.ones(64, 6, dtype=torch.bool)
    bias = counts.log().expand(64, -1)
    with torch.inference_mode():
        rectified = _decode(model, embeds, bias, places, real, -1, 1)
        plain = _decode(model, embeds, bias * 0, places, real, -1, 1)
        often = [x.repeat_interleave(counts, dim=1) for x in (embeds, places, real)]
        often = _decode(model, often[0], torch.zeros(64, 10), *often[1:], -1, 1)
    assert rectified == often != plain

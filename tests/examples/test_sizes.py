"""192 pixels: from nothing by the command, and from a checkpoint for 112 with its position embeddings interpolated."""

import sys

import pytest
import torch
import train
from accuracy import answer
from make_questions import questions_of
from training.loop import Plan, Trainer
from training.model import enlarge, make_model, make_processor
from transformers import AutoProcessor, LlavaForConditionalGeneration

CPU = torch.device("cpu")


def grid(model):
    """Position embeddings of the patches, [rows, columns, D], and that of the class token."""
    weight = model.model.vision_tower.embeddings.position_embedding.weight.detach()
    side = int((len(weight) - 1) ** 0.5)
    return weight[1:].view(side, side, -1), weight[0]


def ramp(side):
    """A small model whose position embeddings rise evenly over the picture: column in the first half, row in the second."""
    torch.manual_seed(0)
    model = make_model(side, "eager", layers=(1, 1))
    place = (torch.arange(side // 8) + 0.5) / (side // 8)
    with torch.no_grad():
        grid(model)[0][..., :96] = place[None, :, None]
        grid(model)[0][..., 96:] = place[:, None, None]
    return model


def test_equal_grid_changes_nothing():
    model = ramp(112)
    same = enlarge(model, 112)
    assert same is not model
    for name, value in model.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    assert same.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("old, new", [(112, 192), (192, 112)])
def test_positions_keep_their_place_in_the_picture(old, new):
    model = ramp(old)
    larger = enlarge(model, new)
    (positions, first), (before, first_before) = grid(larger), grid(model)
    assert positions.shape == (new // 8, new // 8, 192) and torch.equal(first, first_before)
    expected, _ = grid(ramp(new))
    inner = slice(2, -2)  # the outermost rows cannot be interpolated, only held
    torch.testing.assert_close(positions[inner, inner], expected[inner, inner], rtol=0, atol=0.02)
    for row in (0, -1):
        for column in (0, -1):
            torch.testing.assert_close(positions[row, column], before[row, column], rtol=0, atol=0.05)
    for name, value in model.state_dict().items():
        assert "position_embedding" in name or torch.equal(larger.state_dict()[name], value), name
    assert larger.config.vision_config.image_size == new and larger.config.image_seq_length == (new // 8) ** 2
    assert model.config.vision_config.image_size == old
    assert larger.config.text_config._attn_implementation == "eager"
    trainer = Trainer(larger, make_processor(new), Plan(side=new, steps=9, batch=1, looking=0), CPU)
    (losses,) = trainer.run(until=1)
    assert all(0 < loss < 30 for loss in losses.values())


def run(monkeypatch, *options):
    monkeypatch.setattr(train, "make_model", lambda *args: make_model(*args, layers=(1, 1)))
    monkeypatch.setattr(sys, "argv", ["train", *options, "--batch", "1", "--text", "32"])
    train.main()


@pytest.mark.parametrize("start", ["nothing", "112 pixels"])
def test_the_command_at_192(start, tmp_path, monkeypatch):
    steps, init = "2", []
    if start == "112 pixels":
        smaller = tmp_path / "smaller"
        make_model(112, "eager", layers=(1, 1)).save_pretrained(smaller)
        make_processor(112).save_pretrained(smaller)
        steps, init = "1", ["--init", str(smaller)]
    run(monkeypatch, "--size", "192", "--steps", steps, *init, "--out", str(tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoint"
    processor, model = (
        AutoProcessor.from_pretrained(folder),
        LlavaForConditionalGeneration.from_pretrained(folder),
    )
    asked = list(questions_of(70001, 192))[:3]
    inputs = processor(text="<bos> USER: <image> a", images=asked[0][0], return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (192, 192)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576
    assert len(list(answer(model.eval(), processor, asked))) == 3

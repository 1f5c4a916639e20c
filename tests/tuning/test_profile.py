"""The profile of layers: against eager attention, on planted attention, and what it draws."""

import json
import shutil

import pytest
import torch

from helpers.command_line import CHECKPOINT, EXAMPLE
from vlmprune import ops
from vlmprune.checkpoints import Checkpoint
from vlmprune.eval.ask import Subject, show, with_template
from vlmprune.eval.questions import read_questions
from vlmprune.tuning import profile as module
from vlmprune.tuning import profile_layers
from vlmprune.tuning.profile import _attention, _drawn, _shares


@pytest.fixture
def folder(tmp_path):
    """The pictures of the example with all their questions, without answers."""
    entries = json.loads((EXAMPLE / "images" / "questions.json").read_text())
    lines = []
    for entry in entries:
        shutil.copy(EXAMPLE / "images" / entry["image"], tmp_path)
        for i, asked in enumerate(entry["qa"]):
            lines.append({"id": f"{entry['seed']}-{i}", "image": entry["image"], "prompt": asked["prompt"]})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_attention_is_that_of_the_model(folder):
    checkpoint = Checkpoint(str(CHECKPOINT), device="cpu", dtype="float32", attention="eager")
    asked = with_template(checkpoint, read_questions(folder, labelled=False))
    group = [question for question in asked if question.image == asked[0].image][:3]
    subject = Subject(checkpoint, 3, 1)
    inputs = show(subject, group).inputs
    with torch.no_grad():
        layers = checkpoint.model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"] == checkpoint.config.image_token_id
    with ops.use_backend("reference"):
        seen = _attention(subject, group, 8)
    assert len(seen) == 7  # the last layer's comes too late for any stage
    for read, weights in zip(seen, layers, strict=False):
        paid = weights[:, :, -1].masked_fill(~visual[:, None], 0.0)
        paid = (paid / paid.sum(-1, keepdim=True)).mean(1)
        expected = torch.stack([row[own] for row, own in zip(paid, visual, strict=True)])
        torch.testing.assert_close(read, expected, atol=1e-5, rtol=1e-4)


def test_the_layer_of_the_example_is_found(folder):
    told = []
    checkpoint = Checkpoint(str(CHECKPOINT), device="cpu", dtype="float32")
    with ops.use_backend("reference"):
        found = profile_layers(checkpoint, folder, images=6, progress=lambda *step: told.append(step))
    assert [row.layer for row in found.layers] == [*range(1, 8)] and found.images == 6
    assert found.recommended == 5
    first, fourth, fifth = (found.layers[i] for i in (0, 3, 4))
    assert first.seeks.mean < 0.2 < fourth.seeks.mean < fifth.seeks.mean
    assert told[1:] == [("images", done, 6) for done in range(6)]
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["recommended"] == 5 and plain["layers"][4]["seeks"]["mean"] == fifth.seeks.mean


def test_what_image_and_question_foretell_is_not_sought():
    generator = torch.Generator().manual_seed(0)
    image, question = (torch.rand(*size, 40, generator=generator) + 0.1 for size in ((5, 1), (1, 5)))
    moves, seeks = _shares(image * question)
    assert max(seeks) == 0.0 and min(moves) > 0.1
    moves, seeks = _shares(image.expand(5, 5, 40).contiguous())
    assert max(moves) == max(seeks) == 0.0


def test_what_is_sought_is_counted():
    """Question q looks at four places of its own in image i: nothing in common, and not to be foretold."""
    seen = torch.full((4, 4, 64), 1e-3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).view(4, 16)
    for i in range(4):
        for q in range(4):
            seen[i, q, order[(i + q) % 4]] = 1.0 + torch.arange(16) / 16
    moves, seeks = _shares(seen)
    assert moves == [1.0] * 4
    assert min(seeks) > 0.5
    assert max(_shares(seen[:1].expand(4, 4, 64).contiguous())[1]) == 0.0  # of every image the same


def test_drawn_questions_are_of_one_size_and_all_different(folder):
    asked = read_questions(folder, labelled=False)
    drawn = _drawn(asked, 3, 0)
    assert len({q.image for q in drawn}) == len({q.prompt for q in drawn}) == 3
    assert _drawn(asked, 3, 0) == drawn and len(_drawn(asked, 99, 0)) == len({q.image for q in asked})


@pytest.mark.parametrize(
    "change, said",
    [
        ({"images": 1}, r"^images: expected at least 2, got 1$"),
        (
            {"questions": "one"},
            r"^questions: expected different ones about at least two images of one size, got 1 of",
        ),
    ],
)
def test_bad_input(folder, monkeypatch, change, said):
    monkeypatch.setattr("vlmprune.checkpoints.AutoModelForImageTextToText", None)
    lines = (folder / "questions.jsonl").read_text().splitlines()
    if change.pop("questions", None):
        (folder / "questions.jsonl").write_text(lines[0])
    with pytest.raises(ValueError, match=said):
        profile_layers(Checkpoint(str(CHECKPOINT), device="cpu", dtype="float32"), folder, **change)


def test_no_layer_stands_out():
    rows = [module.Layer(i, *[module.Estimate(0.09, 0.0, 0.1)] * 2) for i in (1, 2)]
    assert module.recommend(rows) is None

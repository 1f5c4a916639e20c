"""Notes are true and tell what they should; packed text says to the model what prompts would."""

import numpy as np
import pytest
import torch
import train
from torch.nn.functional import cross_entropy
from training import batches
from training.batches import IGNORED, NOTES, make_batch, make_text
from training.captions import KINDS, caption_loss, make_sheets, score_captions
from training.loop import Plan, Trainer
from training.losses import answer_loss, packed_mask
from training.model import make_model, make_processor
from training.wording import Wording
from transformers import GPT2Config, GPT2LMHeadModel
from world.notes import about, complete, everything, name, place, says, some, take_notes
from world.questions import ask_all
from world.scenes import make_scene
from world.words import LETTERS, SHAPES, TOKEN_ID, VOCABULARY

from vlmprune.compensation import Captioner, Discarded

PROCESSOR = make_processor(112)
WORDING = Wording(PROCESSOR)
SEED = 70003  # with a sign


def test_first_wordings_by_hand():
    scene = make_scene(SEED)
    thing = scene.things[0]
    row, col = scene.cell(thing.box)
    x1, y1, x2, y2 = scene.steps(thing.box)
    said = f"{name(thing)} row {row} col {col} box {x1} {y1} {x2} {y2} ."
    assert " ".join(place(scene, name(thing), thing.box)) == said
    assert " ".join(place(scene, name(thing), thing.box, kind="cell")) == said.split(" box")[0] + " ."
    letters = [LETTERS[i] for i in scene.sign.letters]
    assert says(scene) == ("sign", *letters, ".")
    assert len(everything(scene)) == len(scene.things) + 2


def test_every_note_is_of_the_vocabulary_and_ends():
    rng = np.random.default_rng(0)
    for seed in range(30):
        scene = make_scene(seed)
        for question in ask_all(scene, rng):
            notes = [about(scene, question), about(scene, question, rng), *some(scene, rng, 3)]
            for note in [*notes, *everything(scene, rng)]:
                assert note[-1] == "." and note.count(".") == 1
                assert set(note) <= set(VOCABULARY)


@pytest.mark.parametrize("plain", [True, False])
def test_a_note_about_a_question_holds_the_words_of_its_answer(plain):
    rng = np.random.default_rng(0)
    asked = 0
    for seed in range(30):
        scene = make_scene(seed)
        for question in ask_all(scene, rng):
            note = about(scene, question, None if plain else rng)
            if question.family == "exist":  # yes or no is not said of what has a place
                there = question.answer == ("yes",)
                assert set(question.words[3:-1]) <= set(note) and ("no" in note) != there
            else:
                words = set(question.answer) - {"it", "is", "a"}
                assert words <= set(note), (question, note)
            asked += 1
    assert asked > 100


def test_a_question_sees_the_notes_of_its_document_alone():
    segment, document = torch.tensor([[NOTES, 1, 2, NOTES, 3, 0]]), torch.tensor([[1, 1, 1, 2, 2, 0]])
    allowed = packed_mask(segment, document, 1)[0, 0] == 0
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 0, 1],
    ]


def test_questions_about_notes_are_prompts_without_a_picture():
    """The loss of a packed row is that of the same words asked of the model as text, one question at a time."""
    torch.manual_seed(0)
    model = make_model(112, "eager", layers=(1, 2))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    for layer in model.model.language_model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.05)
    text = make_text([3], 112, WORDING)
    segment, document, start = text.segment[0], text.document[0], len(text.prefix)
    with torch.no_grad():
        packed = answer_loss(model, torch.zeros(1, 0, 256), text)
        alone = []
        for number in range(1, int(segment.max()) + 1):
            asked = segment == number
            told = (segment == NOTES) & (document == document[asked][0])
            prompt = torch.cat([text.prefix, text.ids[0][told], text.ids[0][asked]])
            places = torch.cat([torch.arange(start), text.positions[0][told], text.positions[0][asked]])
            assert (
                places[start:].diff() == 1
            ).all()  # one text, as pruning leaves it behind some of a picture
            words = model(input_ids=prompt[None], position_ids=places[None]).logits[0, -int(asked.sum()) :]
            labels = text.labels[0][asked]
            alone.append(cross_entropy(words[labels != IGNORED], labels[labels != IGNORED], reduction="none"))
    assert len(alone) > 3 and int(document.max()) > 1
    torch.testing.assert_close(packed, torch.cat(alone).mean(), rtol=1e-4, atol=1e-5)


def test_pictures_have_notes_only_where_they_are_wanted():
    plain, noted = (make_batch(range(8), 112, WORDING, 192, notes=notes) for notes in (False, True))
    assert not (plain.segment == NOTES).any()
    behind = (noted.segment == NOTES).any(1)
    assert behind.any() and not behind.all()


def test_notes_are_completed_and_of_everything_where_many_are_asked_for():
    scene, rng = make_scene(SEED), np.random.default_rng(0)
    asked = list(ask_all(scene, rng))
    sizes = {len(take_notes(scene, asked, rng, others=0)) for _ in range(20)}
    assert sizes == {len(asked), len(scene.things) + 2}
    notes = take_notes(scene, asked[:2], rng, others=1)
    assert len(notes) == 3
    completed = {question.words + question.answer for question in complete(notes, rng)}
    assert completed == set(notes)


@pytest.mark.parametrize("pictures", [0, 1])
def test_learning_to_read_changes_the_decoder_only(pictures):
    torch.manual_seed(0)
    plan = Plan(steps=2, batch=pictures, text=192, looking=0.0, notes=2)
    trainer = Trainer(
        make_model(112, "eager", layers=(1, 1)), PROCESSOR, plan, torch.device("cpu"), mixed=False
    )
    before = {key: value.clone() for key, value in trainer.parts.state_dict().items()}
    assert [set(losses) for losses in trainer.run()] == [{"told", *["answers"] * pictures}] * 2
    changed = {
        key for key, value in trainer.parts.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed and all(
        key.startswith(("model.model.language_model.", "model.lm_head.")) for key in changed
    )


@pytest.mark.parametrize("options", [("--notes", "-1"), ("--notes", "2"), ("--notes", "2", "--init", "x")])
def test_notes_that_cannot_be_taught_are_refused(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", *options, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "--notes: expected" in capsys.readouterr().err


def test_a_step_of_nothing_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--batch", "0", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "--batch: expected at least 1 without --notes, got 0" in capsys.readouterr().err


def test_notes_behind_a_picture_may_be_of_another_scene(monkeypatch):
    """Then only they answer, and nothing is asked about the picture."""
    monkeypatch.setattr(batches, "_NOTED", 1.0)
    monkeypatch.setattr(batches, "_ELSEWHERE", 1.0)
    elsewhere = make_batch(range(20, 24), 112, WORDING, 192, notes=True)
    monkeypatch.setattr(batches, "_ELSEWHERE", 0.0)
    here = make_batch(range(20, 24), 112, WORDING, 192, notes=True)
    assert torch.equal(elsewhere.images, here.images) and not torch.equal(elsewhere.ids, here.ids)
    assert (elsewhere.segment.amax(1) <= 8).all() and (here.segment.amax(1) > 8).any()


@pytest.fixture(scope="module")
def captioner():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_positions=128, n_embd=32, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=TOKEN_ID["<bos>"], eos_token_id=TOKEN_ID["<eos>"],
    )  # fmt: skip
    return Captioner.make(256, GPT2LMHeadModel(config), PROCESSOR.tokenizer, prefix=4, layers=1)


# a caption of several notes does not end with its first full stop
@pytest.mark.parametrize("kind, end", [*((kind, None) for kind in KINDS), ("asked", "."), ("general", ".")])
def test_the_loss_of_sheets_is_the_captioners_likelihood(kind, end, captioner, monkeypatch):
    monkeypatch.setattr(captioner.config, "end", end)
    monkeypatch.setattr(captioner.config, "max_new_tokens", 100)
    sheets = make_sheets([4, 5], 112, 196, kind, pairs=3)
    assert {len(sheet.dropped) for sheet in sheets} == {len(sheets[0].dropped)} and len(
        sheets[0].dropped
    ) < 196
    features = torch.randn(2, 196, 256)
    shown = [
        (Discarded(f, s.dropped, " ".join(q.words)), " ".join(c))
        for f, s in zip(features, sheets, strict=True)
        for q, c in s.pairs
    ]
    sums, counts = captioner.log_likelihood(*map(list, zip(*shown, strict=True)))
    torch.testing.assert_close(caption_loss(captioner, features, sheets), -sums.sum() / counts.sum())


def test_scores_of_captions_by_hand():
    sheets = make_sheets(range(40), 112, 196, "asked", pairs=6)
    pairs = [(s.scene, q) for s in sheets for q, _ in s.pairs]
    right = [" ".join(c) for s in sheets for _, c in s.pairs]
    scores = score_captions(pairs, right)
    assert all(scores.pop(key) == 1 for key in ("named", "placed", "boxed", "letters", "tells"))
    assert scores.pop("found") < 0.5
    assert set(scores.values()) == {1.0}
    scene, question = next(pair for pair in pairs if pair[1].family == "at")
    thing = next(t for t in scene.things if t.box == question.box)
    other = SHAPES[(thing.shape + 1) % len(SHAPES)]
    wrong = " ".join(about(scene, question)).replace(SHAPES[thing.shape], other)
    scores = score_captions([(scene, question)], [wrong])
    assert scores["named"] == scores["tells"] == 0

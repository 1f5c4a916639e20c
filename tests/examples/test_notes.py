"""Notes are true and tell what they should; with them in front, a blind question has everything but the picture."""

import numpy as np
import pytest
import torch
import train
from torch.nn.functional import cross_entropy
from training.batches import IGNORED, make_batch
from training.captions import KINDS, caption_loss, make_sheets, score_captions
from training.loop import Plan, Trainer
from training.losses import answer_loss, packed_mask, see
from training.model import make_model, make_processor
from training.wording import Wording
from transformers import GPT2Config, GPT2LMHeadModel
from world.notes import about, everything, name, place, says, some, take_notes
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
            assert take_notes(scene, question, rng, telling=True)


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


def test_a_blind_question_does_not_see_the_picture():
    allowed = packed_mask(torch.tensor([[1, 1, 2, 2]]), 3, torch.tensor([[0, 0, 1, 1]]), prefix=1)[0, 0] == 0
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1, 1],
    ]


def test_blind_questions_are_prompts_without_a_picture():
    """Their loss is that of the same words asked of the model as text alone."""
    torch.manual_seed(0)
    model = make_model(112, "eager", layers=(1, 2))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    for layer in model.model.language_model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.05)
    batch = make_batch([SEED], 112, WORDING, 384, notes=1.0)
    seeing = batch.blind[0] == 0
    batch.labels[0][seeing] = IGNORED
    with torch.no_grad():
        packed = answer_loss(model, see(model, batch.images)[1], batch)
        alone = []
        for number in batch.segment[0][~seeing].unique():
            here = batch.segment[0] == number
            ids, labels = batch.ids[0][here], batch.labels[0][here]
            prompt = torch.cat([batch.prefix, ids])
            start = int(batch.positions[0][here][0])  # a prompt from which pruning took some of the picture
            places = torch.cat([torch.arange(len(batch.prefix)), start + torch.arange(len(ids))])
            words = model(input_ids=prompt[None], position_ids=places[None]).logits[0, len(batch.prefix) :]
            alone.append(cross_entropy(words[labels != IGNORED], labels[labels != IGNORED], reduction="none"))
    assert len(alone) > 2
    torch.testing.assert_close(packed, torch.cat(alone).mean(), rtol=1e-4, atol=1e-5)


def test_without_notes_nothing_is_blind_and_with_them_some_are():
    plain, noted = make_batch([1, 2], 112, WORDING), make_batch([1, 2], 112, WORDING, 384, notes=1.0)
    assert not plain.blind.any()
    assert noted.blind.any() and not noted.blind.all()
    full_stop = TOKEN_ID["."]
    for row in range(2):
        for number in range(1, int(noted.segment[row].max()) + 1):
            here = noted.segment[row] == number
            assert full_stop in noted.ids[row][here][:-2]


def test_learning_to_read_changes_the_decoder_only():
    torch.manual_seed(0)
    plan = Plan(steps=2, batch=1, text=192, looking=0.0, notes=0.8)
    trainer = Trainer(
        make_model(112, "eager", layers=(1, 1)), PROCESSOR, plan, torch.device("cpu"), mixed=False
    )
    before = {key: value.clone() for key, value in trainer.parts.state_dict().items()}
    assert [set(losses) for losses in trainer.run()] == [{"answers"}] * 2
    changed = {
        key for key, value in trainer.parts.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed and all(
        key.startswith(("model.model.language_model.", "model.lm_head.")) for key in changed
    )


@pytest.mark.parametrize(
    "options", [("--notes", "1.5"), ("--notes", "0.5"), ("--notes", "0.5", "--init", "x")]
)
def test_notes_that_cannot_be_taught_are_refused(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", *options, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert "--notes: expected" in capsys.readouterr().err


@pytest.fixture(scope="module")
def captioner():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_positions=128, n_embd=32, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=TOKEN_ID["<bos>"], eos_token_id=TOKEN_ID["<eos>"],
    )  # fmt: skip
    return Captioner.make(256, GPT2LMHeadModel(config), PROCESSOR.tokenizer, prefix=4, layers=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [None, "."])
def test_the_loss_of_sheets_is_the_captioners_likelihood(kind, end, captioner, monkeypatch):
    if end and kind == "scene":
        pytest.skip("a caption of several notes does not end with its first full stop")
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

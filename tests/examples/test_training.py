"""Training: packing changes no prediction, a step learns, a resumed run is the same run, the result loads."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from accuracy import answer, overlap, score
from make_questions import questions_of
from torch.nn.functional import cross_entropy
from training.batches import FAMILIES, IGNORED, MIX, difficulty, make_batch
from training.decoder import join, load_decoder
from training.loop import Plan, Trainer
from training.losses import answer_loss, packed_mask, see
from training.model import make_model, make_processor
from training.wording import Wording, full_prompt
from transformers import AutoProcessor, LlavaForConditionalGeneration
from world.clutter import FIRST_SEED
from world.questions import ask
from world.scenes import make_scene
from world.words import TOKEN_ID

CPU = torch.device("cpu")
PROCESSOR = make_processor(112)
WORDING = Wording(PROCESSOR)


@pytest.fixture(scope="module")
def small():
    """Return a function (plan) -> Trainer with the same random weights every time, one layer deep or more."""

    def make(plan, layers=1):
        torch.manual_seed(0)
        return Trainer(make_model(112, "eager", layers=(layers, layers)), PROCESSOR, plan, CPU, mixed=False)

    return make


def test_batches_depend_on_the_seed_alone():
    first, again = make_batch([7, 8], 112, WORDING), make_batch([8], 112, WORDING)
    assert torch.equal(first.ids[1], again.ids[0]) and torch.equal(first.images[1], again.images[0])
    assert torch.equal(first.patch_box[1], again.patch_box[0])
    assert not torch.equal(first.ids[0], first.ids[1])


def test_half_of_a_cluttered_batch_is_at_full_clutter():
    """The others have less, down to none; and what is drawn is what the labels say."""
    seeds = range(40)
    batch = make_batch(seeds, 112, WORDING, clutter=1.0)
    full = [torch.from_numpy(make_scene(seed, 112, 1.0).image) for seed in seeds]
    same = sum(torch.equal(image, there) for image, there in zip(batch.images, full, strict=True))
    assert 10 <= same <= 30
    plain = make_batch(seeds, 112, WORDING)
    assert not any(torch.equal(image, there) for image, there in zip(batch.images, plain.images, strict=True))
    for row, seed in enumerate(seeds):
        shapes = sorted(1 + thing.shape for thing in make_scene(seed, 112, difficulty(seed)).things)
        assert sorted(batch.anchor_shape[row][batch.anchor_shape[row] > 0].tolist()) == shapes


def test_mix_is_a_distribution_over_the_families():
    assert set(MIX) == set(FAMILIES)
    assert sum(MIX.values()) == pytest.approx(1)


@pytest.mark.parametrize("side", [112, 192])
def test_dense_targets_are_the_scene(side):
    batch = make_batch(range(20), side, WORDING)
    assert batch.patch_class.shape == (20, (side // 8) ** 2)
    things = shown = 0
    for row, seed in enumerate(range(20)):
        scene = make_scene(seed, side)
        anchors = batch.anchor_shape[row]
        assert sorted(anchors[anchors > 0].tolist()) == sorted(1 + thing.shape for thing in scene.things)
        assert torch.equal(anchors > 0, batch.anchor_color[row] > 0)
        truth = {(*scene.steps(thing.box), 1 + thing.shape, 1 + thing.color) for thing in scene.things}
        seen = torch.cat(
            [batch.patch_box[row], batch.patch_class[row, :, None], batch.patch_color[row, :, None]], 1
        )
        seen = set(map(tuple, seen[batch.patch_color[row] > 0].tolist()))
        assert seen <= truth
        things, shown = things + len(truth), shown + len(seen)
    assert shown >= 0.95 * things  # a thin thing may have too few pixels in every patch


def test_packed_mask_by_hand():
    allowed = packed_mask(torch.tensor([[1, 1, 2, 0]]), torch.tensor([[1, 1, 1, 0]]), first=1)[0, 0] == 0
    assert allowed.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("decoder", ["from nothing", "pretrained"])
def test_packing_changes_no_prediction(decoder, small, llama):
    """The loss of a packed batch is that of every question asked alone through the processor."""
    model, processor = small(Plan(), layers=2).model, PROCESSOR
    if decoder == "pretrained":
        pretrained, tokenizer = load_decoder(str(llama))
        model, processor = join(pretrained, tokenizer, 112, "eager", model), make_processor(112, tokenizer)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # predictions that differ from word to word
    for layer in model.model.language_model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.05)
    wording = Wording(processor)
    batch = make_batch([70001], 112, wording)
    with torch.no_grad():
        packed = answer_loss(model, see(model, batch.images)[1], batch)
        alone = []
        for number in range(1, int(batch.segment.max()) + 1):
            here = batch.segment[0] == number
            ids, labels = batch.ids[0][here], batch.labels[0][here]
            prompt = processor.tokenizer.decode([*wording.prefix, processor.image_token_id, *ids])
            image = next(questions_of(70001, 112))[0]
            inputs = processor(text=prompt, images=image, return_tensors="pt")
            words = model(**inputs, logits_to_keep=len(ids)).logits[0]
            alone.append(cross_entropy(words[labels != IGNORED], labels[labels != IGNORED], reduction="none"))
    assert len(alone) > 3
    torch.testing.assert_close(packed, torch.cat(alone).mean(), rtol=1e-4, atol=1e-5)


def test_words_are_the_vocabulary_and_the_chat_template():
    rng = np.random.default_rng(0)
    asked = [ask(make_scene(seed), family, rng) for seed in range(5) for family in FAMILIES]
    assert WORDING.prefix == (TOKEN_ID["<bos>"], TOKEN_ID["USER:"])
    for question in filter(None, asked):
        words, answer_ids = WORDING.encode(question)
        assert words == [TOKEN_ID[word] for word in (*question.words, "ASSISTANT:")]
        assert answer_ids == [TOKEN_ID[word] for word in (*question.answer, "<eos>")]


def test_shipped_checkpoint_asks_as_training_does():
    shipped = AutoProcessor.from_pretrained(Path(train.__file__).parent / "checkpoint")
    question = "is there a red star ?"
    assert full_prompt(shipped, question) == full_prompt(PROCESSOR, question)
    assert full_prompt(shipped, question) == f"<bos> USER: <image> {question} ASSISTANT:"


def test_text_without_room_for_a_question_is_refused():
    with pytest.raises(ValueError, match=r"text: expected room for every question, got 8 \(one takes \d+\)"):
        make_batch([1], 112, WORDING, text=8)


@pytest.mark.parametrize("looking", [0.0, 1.0], ids=["answers", "dense only"])
def test_steps_lower_the_loss(small, looking):
    trainer = small(Plan(steps=100, batch=2, rate=0.05, looking=looking))
    batch = make_batch([1, 2], 112, WORDING)
    losses = [trainer.train_step(batch) for _ in range(8)]
    assert set(losses[0]) == ({"dense"} if looking else {"dense", "answers"})
    for name in losses[0]:
        assert losses[-1][name] < 0.9 * losses[0][name]


def test_resumed_is_uninterrupted(small, tmp_path):
    plan = Plan(steps=4, batch=1, looking=0.25)
    whole, stopped, resumed = small(plan), small(plan), small(plan)
    assert len(list(whole.run())) == 4
    assert len(list(stopped.run(until=2))) == 2
    stopped.save(tmp_path / "state.pt")
    resumed.load(tmp_path / "state.pt")
    assert resumed.progress == 0.5
    assert len(list(resumed.run())) == 2
    for a, b in zip(whole.parts.state_dict().values(), resumed.parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    start = small(plan).parts.state_dict()
    changed = [
        name for name, value in whole.parts.state_dict().items() if not torch.equal(value, start[name])
    ]
    assert any("language_model" in name for name in changed) and any("vision" in name for name in changed)


def test_a_time_budget_ends(small):
    trainer = small(Plan(minutes=0.02, batch=1))
    assert len(list(trainer.run())) > 1
    assert trainer.progress >= 1
    assert list(trainer.run()) == []


@pytest.mark.parametrize("slow", [False, True])
def test_the_command_writes_a_checkpoint(slow, tmp_path, monkeypatch):
    """Whether or not the CPU is slow in bfloat16, which decides in what precision it trains, and by which attention."""
    monkeypatch.setattr(train, "slow_on_cpu", lambda dtype: slow)
    out = tmp_path / "run"
    command = ["train", "--steps", "2", "--batch", "1", "--text", "32", "--out", str(out)]
    monkeypatch.setattr(train, "make_model", lambda *args: make_model(*args, layers=(1, 1)))
    monkeypatch.setattr(train, "_LOG_EVERY", 2)
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    (line,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert line["step"] == 2 and line["answers"] > 0
    model = LlavaForConditionalGeneration.from_pretrained(out / "checkpoint")
    assert model.dtype == torch.bfloat16
    assert "float32" not in (out / "checkpoint" / "config.json").read_text()
    asked = list(questions_of(70001, 112))[:3]
    answers = list(answer(model, AutoProcessor.from_pretrained(out / "checkpoint"), asked, batch=2))
    assert len(answers) == 3
    with pytest.raises(
        SystemExit, match=r"--out: expected a new folder or --resume, got .*, which holds a run"
    ):
        train.main()
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    train.main()  # nothing is left to do: the same checkpoint again
    again = LlavaForConditionalGeneration.from_pretrained(out / "checkpoint")
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("option", [("--minutes", "0"), ("--steps", "0"), ("--text", "31")])
def test_small_budgets_are_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", *option, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert f"{option[0]}: expected at least" in capsys.readouterr().err


def test_resume_of_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--resume", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"--resume: expected a run in --out, got .*run without state\.pt"):
        train.main()
    assert not (tmp_path / "run").exists()


def test_576_visual_tokens():
    plan = Plan(side=192, steps=9, batch=1, looking=0)
    trainer = Trainer(make_model(192, "sdpa", layers=(1, 1)), make_processor(192), plan, CPU)
    assert see(trainer.model, make_batch([1], 192, WORDING).images)[1].shape == (1, 576, 256)
    (losses,) = trainer.run(until=1)
    assert set(losses) == {"dense", "answers"} and all(0 < loss < 30 for loss in losses.values())


@pytest.mark.parametrize(
    ("name", "side", "seed", "clutter"),
    [
        ("checkpoint", 112, 70001, 0),
        ("checkpoint-576", 192, 70001, 0),
        ("checkpoint-576-clutter", 192, 70003, 1),
    ],
)
def test_shipped_checkpoint_answers(name, side, seed, clutter):
    """Eight families of one scene in one padded batch: the easy ones are right."""
    folder = Path(train.__file__).parent / name
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    asked = list(questions_of(seed, side, clutter=clutter))
    rows = score([e for _, e in asked], list(answer(model, AutoProcessor.from_pretrained(folder), asked)))
    assert rows["box"]["found"] == rows["color"]["exact"] == rows["shape"]["exact"] == 1


def test_score_and_overlap():
    assert overlap("0 0 4 4", "0 0 4 4") == 1 and overlap("0 0 4 4", "0 2 4 6") == pytest.approx(1 / 3)
    for broken in ("", "1 2 3", "4 4 0 0", "red 1 2 3", "1 2 3 4 5"):
        assert overlap("0 0 4 4", broken) == 0
    entries = [{"family": "box", "answer": "0 0 4 4"}, {"family": "read", "answer": "A B C"}]
    assert score(entries, ["0 0 4 5", "A B C"]) == {
        "box": {"questions": 1, "exact": 0.0, "found": 1.0},
        "read": {"questions": 1, "exact": 1.0},
    }


def test_training_seeds_are_apart_from_held_out_ones():
    assert FIRST_SEED > 70301

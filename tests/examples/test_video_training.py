"""Training on clips: packing changes no prediction, a step learns and leaves the tower, the result loads and is pruned."""

import json
from pathlib import Path

import pytest
import torch
import train_video
from clip_accuracy import answer_clips
from make_clips import clip_questions_of
from torch.nn.functional import cross_entropy
from training.loop import Plan
from training.model import make_model
from training.video_model import TOKENS, ClipProcessor, make_tokenizer, watching
from training.videos import MIX, MOTIONS, ClipHeads, ClipTrainer, clip_losses, make_clips, see_clips
from training.wording import Wording
from transformers import AutoModelForImageTextToText
from world.video_words import CLIP_TOKEN_ID, CLIP_VOCABULARY, FAMILIES
from world.videos import FRAMES, cell, make_clip

import vlmprune

CPU = torch.device("cpu")
PROCESSOR = ClipProcessor(make_tokenizer())
WORDING = Wording(PROCESSOR, "video")


@pytest.fixture(scope="module")
def tiny():
    """Return a function () -> a model for clips with the same random weights every time."""

    def make():
        torch.manual_seed(0)
        model = watching(make_model(112, "eager", layers=(1, 6)), "eager")
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # predictions that differ from word to word
        for layer in model.model.language_model.layers:
            torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.05)
        return model.eval()

    return make


def test_batches_depend_on_the_seed_alone():
    first, again = make_clips([7, 8], WORDING), make_clips([8], WORDING)
    assert torch.equal(first.ids[1], again.ids[0]) and torch.equal(first.images[1], again.images[0])
    assert torch.equal(first.motion[1], again.motion[0])
    assert not torch.equal(first.ids[0], first.ids[1])


def test_mix_is_a_distribution_over_the_families():
    assert set(MIX) == set(FAMILIES) and sum(MIX.values()) == pytest.approx(1)


def test_dense_targets_are_the_clip():
    batch = make_clips(range(10), WORDING)
    for row in range(10):
        shown = torch.zeros(3, FRAMES, 7, 7, dtype=torch.int64)
        for thing in make_clip(row).things:
            for time in range(thing.first, thing.last + 1):
                motion = "new" if time == thing.first else thing.way or "rest"
                values = 1 + thing.shape, 1 + thing.color, MOTIONS.index(motion)
                shown[:, time, *cell(thing.box(time))] = torch.tensor(values)
                if motion != "new":
                    (t, r, c), (_, down, right) = (
                        (time - 1, *cell(thing.box(time - 1))),
                        (time, *cell(thing.box(time))),
                    )
                    assert batch.before[row].view(FRAMES, 7, 7)[time, down, right] == 49 * t + 7 * r + c
        told = batch.anchor_shape[row], batch.anchor_color[row], batch.motion[row]
        assert torch.equal(torch.stack(told), shown.flatten(1))
        assert torch.equal(batch.before[row] >= 0, batch.motion[row] > MOTIONS.index("new"))


def test_heads_are_told_to_look_at_what_is_asked_about():
    """Where an answer is given, and nowhere else; at a place that is asked for, at its own token in its own frame."""
    batch, places, ends = make_clips(range(10), WORDING), 0, 0
    told = batch.asked.any(-1)
    assert torch.equal(told[:, 0], told[:, 1])
    assert not told[:, 0][batch.labels < 0].any() and told.any()
    for row in range(10):
        for number in range(1, int(batch.segment[row].max()) + 1):
            here = batch.segment[row] == number
            words = [CLIP_VOCABULARY[i] for i in batch.ids[row][here]]
            if words[0] in ("where", "find") and "time" in words and "move" not in words:
                answer = [CLIP_VOCABULARY[i] for i in batch.labels[row][here] if i >= 0]
                time, at = int(words[words.index("time") + 1]), 7 * int(answer[1]) + int(answer[3])
                looked = batch.asked[row][:, here][:, batch.labels[row][here] >= 0]
                assert (looked.sum(-1) == 1).all() and looked[..., 49 * time + at].all()
                places += 1
            if "move" in words:
                first, last = batch.asked[row][:, here][:, -1].int().argmax(-1) // 49
                assert batch.asked[row][:, here][:, -1].sum() == 2 and last - first >= 2
                ends += 1
    assert places > 10 and ends > 5


def test_packing_changes_no_prediction(tiny):
    """The loss of a packed batch is that of every question asked alone through the processor."""
    model, batch = tiny(), make_clips([70001], WORDING, text=96)
    with torch.no_grad():
        packed, *_ = clip_losses(model, ClipHeads(1, 256), see_clips(model, batch.images), batch)
        alone = []
        for number in range(1, int(batch.segment.max()) + 1):
            here = batch.segment[0] == number
            ids, labels = batch.ids[0][here], batch.labels[0][here]
            text = PROCESSOR.tokenizer.decode([*WORDING.prefix, CLIP_TOKEN_ID["<video>"], *ids])
            inputs = PROCESSOR([text], [make_clip(70001).frames])
            assert (inputs["input_ids"] == CLIP_TOKEN_ID["<video>"]).sum() == TOKENS
            words = model(**inputs, logits_to_keep=len(ids)).logits[0]
            alone += cross_entropy(words, labels, reduction="none")[labels >= 0].tolist()
    assert len(alone) > 10
    assert float(packed) == pytest.approx(sum(alone) / len(alone), rel=1e-4)


def test_a_step_learns_and_leaves_the_tower(tiny):
    trainer = ClipTrainer(tiny(), PROCESSOR, Plan(112, steps=100, rate=0.01), CPU, False)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    batch = make_clips([1], WORDING, text=96)
    losses = [trainer.train_step(batch) for _ in range(3)]
    assert all(losses[-1][name] < losses[0][name] for name in ("dense", "answers", "time", "looks"))
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, before[name]) == ("vision_tower" in name), name


def test_a_model_of_pictures_keeps_what_it_knows():
    pictures = make_model(112, "eager", layers=(1, 1))
    clips = watching(pictures, "eager").state_dict()
    for name, weight in pictures.state_dict().items():
        assert torch.equal(clips[name][: len(weight)], weight)


def test_pruned_answers(tiny):
    model, asked = tiny(), list(clip_questions_of(5))[:2]
    whole = list(answer_clips(model, PROCESSOR, asked))
    all_kept = vlmprune.policy_from("uniform:layer=1,keep=1.0")
    assert list(answer_clips(model, PROCESSOR, asked, policy=all_kept)) == whole
    few = vlmprune.policy_from("uniform:layer=1,keep=0.02")
    assert list(answer_clips(model, PROCESSOR, asked, policy=few)) != whole


@pytest.mark.parametrize("slow", [False, True])
def test_trains_resumes_and_loads(slow, tiny, tmp_path, monkeypatch, capsys):
    """Whether or not the CPU is slow in bfloat16, which decides in what precision it trains."""
    monkeypatch.setattr(train_video, "slow_on_cpu", lambda dtype: slow)
    tiny().save_pretrained(tmp_path / "start")
    common = ["train", "--out", str(tmp_path / "run"), "--init", str(tmp_path / "start"), "--batch", "1"]
    common += ["--text", "64"]
    monkeypatch.setattr("sys.argv", [*common, "--steps", "1"])
    train_video.main()
    with pytest.raises(SystemExit, match="expected a new folder"):
        train_video.main()
    monkeypatch.setattr("sys.argv", [*common, "--steps", "2", "--resume"])
    train_video.main()
    assert "2 steps" in capsys.readouterr().out
    folder = tmp_path / "run" / "checkpoint"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "llava_onevision"
    processor = ClipProcessor.from_pretrained(folder)
    assert processor.tokenizer.get_vocab() == CLIP_TOKEN_ID
    assert len(list(answer_clips(model, processor, list(clip_questions_of(5))[:2]))) == 2
    settings = json.loads((folder / "processor_config.json").read_text())
    assert settings["video_processor"]["size"] == {"height": 112, "width": 112}


def test_shipped_checkpoint_answers():
    """Most of what it is asked about clips that it has never seen; without the clip's frames in order it knows less."""
    folder = Path(train_video.__file__).parent / "checkpoint-video"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = ClipProcessor.from_pretrained(folder)
    asked = [pair for seed in (70003, 70006) for pair in clip_questions_of(seed)]
    truth = [entry["answer"] for _, entry in asked]

    def right(pairs):
        given = answer_clips(model, processor, pairs)
        return sum(text == answer for text, answer in zip(given, truth, strict=True)) / len(truth)

    whole, backwards = right(asked), right([(frames[::-1], entry) for frames, entry in asked])
    assert whole > 0.65 and backwards < whole

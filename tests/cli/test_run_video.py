"""``vlmprune run --video`` and an evaluation about clips, on a tiny model with videos."""

import json

import pytest
from PIL import Image

from helpers.clips import clip_checkpoint
from helpers.command_line import CHECKPOINT, ask, cli
from vlmprune import FastV
from vlmprune.cli import main
from vlmprune.cli.pictures import read_pictures
from vlmprune.eval import Checkpoint
from vlmprune.eval import run as evaluate
from vlmprune.view.strip import HEIGHT, NEXT


@pytest.fixture
def model(monkeypatch):
    made = clip_checkpoint(monkeypatch)
    monkeypatch.setattr(main, "open_checkpoint", lambda *args: made)
    return made


@pytest.fixture
def clip(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (32, 32), (40 * i, 20, 0)).save(folder / f"{i}.png")
    return folder


def ask_clip(clip, *args):
    return cli("run", "--model", "tiny", "--video", clip, "--prompt", "w5 w6", *args)


def test_answers_and_draws_a_strip(model, clip, tmp_path):
    target = tmp_path / "strip.png"
    policies = ("--policy", "fastv:layer=2,keep=0.5", "--policy", "uniform:layer=0,keep=5")
    done = ask_clip(clip, *policies, "--compare", "--save", target, "--json", "--repeat", 1)
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["images"] == [str(clip)] and told["frames"] == 6
    unpruned, fastv, uniform = told["runs"]
    assert unpruned["report"]["visual_tokens"] == 6 * 4 + 1
    assert [len(kept) for kept in fastv["kept"] + uniform["kept"]] == [12, 5]
    with Image.open(target) as sheet:
        assert sheet.width >= 6 * (HEIGHT + NEXT) and sheet.height > 3 * HEIGHT


def test_a_table(model, clip):
    done = ask_clip(clip, "--policy", "fastv:layer=2,keep=0.5", "--repeat", 1)
    assert done.exit_code == 0, done.stderr
    assert "layer 2: 25→12" in done.stdout


def test_all_frames_are_seen(model, clip):
    """As many tokens as there are frames: none is sampled away."""
    (clip / "5.png").unlink()
    done = ask_clip(clip, "--json", "--repeat", 1)
    assert json.loads(done.stdout)["runs"][0]["report"]["visual_tokens"] == 5 * 4 + 1


def test_evaluates_questions_about_clips(model, clip, tmp_path):
    lines = [
        {"id": str(i), "video": "clip", "family": "when", "prompt": f"w{7 + i} w6" * (1 + i), "answer": "w9"}
        for i in range(3)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    policies = [FastV(layer=2, keep=0.5), "uniform:layer=0,keep=6"]
    found = evaluate(
        model, tmp_path, tmp_path / "out", policies, budgets=(), baselines=False, max_new_tokens=2
    )
    assert found.settings["visual_tokens"] == 25 and len(found.answers) == 9
    assert {len(answer.kept) for answer in found.answers.values()} == {0, 1}
    kept = [int(bits, 16).bit_count() for key, answer in found.answers.items() for _, bits in answer.kept]
    assert sorted(kept) == [6, 6, 6, 12, 12, 12]


def test_evaluation_leaves_smaller_pictures_out(model, clip, tmp_path):
    line = {"id": "1", "video": "clip", "family": "when", "prompt": "w7", "answer": "w9"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    found = evaluate(
        model, tmp_path, tmp_path / "out", ["fastv:layer=2"], budgets=(0.3,), seeds=1, max_new_tokens=1
    )
    assert "smaller: expected questions about images, got clips" in found.settings["left_out"]
    methods = {result.method for result in found.results}
    assert methods >= {"unpruned", "fastv:layer=2", "uniform:layer=2", "random:layer=2"}


def test_images_or_a_clip(clip, scene):
    """Told before torch is imported."""
    with pytest.raises(
        ValueError, match=r"^--image: expected a picture to ask about \(or --video, a clip\), got none$"
    ):
        read_pictures([], None)
    with pytest.raises(ValueError, match=r"^--image: expected none beside --video, got .*scene_70001\.png$"):
        read_pictures([scene], clip)
    done = cli("run", "--model", "x", "--prompt", "x", "--video", clip / "none.gif")
    assert done.exit_code == 2 and done.stderr.startswith(
        "error: --video: expected an animation or a folder of pictures"
    )


def test_a_family_without_videos(clip):
    done = ask("--video", clip)
    assert done.exit_code == 2 and "--image: expected none beside --video" in done.stderr
    done = cli("run", "--model", CHECKPOINT, "--prompt", "hello", "--video", clip, "--device", "cpu")
    assert done.exit_code == 2
    assert done.stderr.startswith(
        "error: --video: expected a checkpoint of a family with videos (llava_onevision, "
    )
    line = {"id": "1", "video": "clip", "family": "when", "prompt": "w7", "answer": "w9"}
    (clip.parent / "questions.jsonl").write_text(json.dumps(line))
    said = r"^questions: expected a checkpoint of a family with videos \(.*\), got llava$"
    with pytest.raises(ValueError, match=said):
        evaluate(Checkpoint(str(CHECKPOINT)), clip.parent, clip.parent / "out", ["evs"])

"""The glance: what is labelled, that training finds it, and that the shipped weights do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lessons import PATCH, found, lessons, loss_of, shown, teach
from transformers import AutoProcessor, LlavaForConditionalGeneration
from world.questions import ask_all
from world.scenes import make_scene
from world.words import COLOR_NAMES, SHAPES

from helpers.methods import WEIGHTS
from helpers.scorers import glance
from vlmprune import Learned
from vlmprune.policies import GlanceScorer, Scorer

GLYPHWORLD = Path(__file__).parents[2] / "examples" / "glyphworld"
SCENES = range(60101, 60103)


def load(name):
    folder = GLYPHWORLD / name
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return model, AutoProcessor.from_pretrained(folder)


def counted(thing, words):
    names = words[2 : words.index("are")]
    return all(name in ("objects", COLOR_NAMES[thing.color], SHAPES[thing.shape]) for name in names)


def test_what_is_labelled():
    nothing = several = 0
    for seed in range(60001, 60021):
        scene = make_scene(seed)
        grid = scene.side // PATCH
        for question in ask_all(scene, np.random.default_rng(seed)):
            boxes = [question.box] if question.box else []
            if question.family == "count":
                boxes = [thing.box for thing in scene.things if counted(thing, question.words)]
                assert str(len(boxes)) == question.answer[0]
            several, nothing = several + (len(boxes) > 1), nothing + (not boxes)
            want = {
                row * grid + column
                for box in boxes
                for row in range(grid)
                for column in range(grid)
                if max(0, min(box.bottom, PATCH * row + PATCH) - max(box.top, PATCH * row))
                * max(0, min(box.right, PATCH * column + PATCH) - max(box.left, PATCH * column))
                >= 8
            }
            got = shown(scene, question)
            assert (got is None) == (not boxes)
            assert got is None or set(np.flatnonzero(got)) == want
    assert nothing and several


def test_training_finds_what_is_asked_for():
    model, processor = load("checkpoint")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    scorer = glance(256).train()
    seen = list(lessons(model, processor, scorer, SCENES, 1))
    assert [len(lesson.shown) > 4 and lesson.shown.shape[1] == 196 for lesson in seen] == [True, True]
    held_out = list(lessons(model, processor, scorer, range(60103, 60105), 2))
    first, start = float(sum(map(loss_of, [scorer] * 2, seen))), found(scorer, held_out, 0.1)
    losses = list(teach(scorer, seen * 12, 24, 0.01))
    assert len(losses) == 24 and float(sum(map(loss_of, [scorer] * 2, seen))) < 0.85 * first
    assert found(scorer, held_out, 0.1) > start + 0.1
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_the_shipped_weights_find_what_is_asked_for():
    """Chance finds a tenth; the weights are small, and say what they are of."""
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 1_000_000
    model, processor = load("checkpoint-576")
    scorer = Scorer.from_pretrained(WEIGHTS)
    assert isinstance(scorer, GlanceScorer) and scorer.layer == 0
    (lesson,) = lessons(model, processor, scorer, SCENES, 2)
    assert found(scorer, [lesson], 0.1) > 0.7
    index = Learned(str(WEIGHTS), layer=0, keep=57).select(lesson.ctx)
    share = lesson.shown.gather(1, index).sum(1) / lesson.shown.sum(1).clamp(max=57)
    assert float(share.mean()) == pytest.approx(found(scorer, [lesson], 0.1), abs=0.01)

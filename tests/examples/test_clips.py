"""Clips and questions about them: the same by seed, their pixels what they say, every answer checked by a second reading."""

import json
from itertools import pairwise

import numpy as np
import pytest
from make_clips import clip_questions_of, main, read_clip
from world.video_questions import ask_clip
from world.video_words import CLIP_TOKEN_ID, CLIP_VOCABULARY, FAMILIES
from world.videos import FRAMES, make_clip
from world.words import COLOR_NAMES, COLORS, SHAPES, SIZE_NAMES, TOKEN_ID

WAYS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
SEEDS = range(60)


@pytest.fixture(scope="module")
def clips():
    return [make_clip(seed) for seed in SEEDS]


def test_a_seed_is_a_clip(clips):
    again = make_clip(3)
    assert again.frames.shape == (FRAMES, 112, 112, 3) and again.frames.dtype == np.uint8
    assert np.array_equal(clips[3].frames, again.frames) and not np.array_equal(clips[4].frames, again.frames)


def test_pixels_show_what_the_clip_says(clips):
    """Every thing has its colour where it covers the pixels; around all of them nothing ever changes."""
    solid = 0
    for clip in clips:
        assert 2 <= len(clip.things) <= 5
        covered = np.zeros((FRAMES, 112, 112), int)
        for thing in clip.things:
            for time in range(FRAMES):
                box = thing.box(time)
                if box is None:
                    continue
                assert 0 < box.left < box.right < 112 and 0 < box.top < box.bottom < 112
                here = np.s_[time, box.top : box.bottom, box.left : box.right]
                covered[here] += 1
                pixels = clip.frames[here][thing.coverage > 0.99]
                if len(pixels) > 4:  # thin ones have none
                    solid += 1
                    distances = [np.abs(pixels.mean(0) - color).sum() for color in COLORS.values()]
                    assert int(np.argmin(distances)) == thing.color
        assert covered.max() == 1
        free = covered.max(0) == 0
        assert (clip.frames[:, free] == clip.frames[0, free]).all()
    assert solid > 500


def test_some_clips_are_calm_and_some_are_busy(clips):
    """By the share of visual tokens whose pixels are those of the frame before."""
    still = []
    for clip in clips:
        blocks = clip.frames.reshape(FRAMES, 7, 16, 7, 16, 3)
        still.append((blocks[1:] == blocks[:-1]).all((2, 4, 5)).mean())
    assert sum(share > 0.97 for share in still) > 10 and sum(share < 0.8 for share in still) > 10
    moves = [thing.way for clip in clips for thing in clip.things]
    assert {None, *WAYS} == set(moves)
    lives = {(thing.first > 0, thing.last < FRAMES - 1) for clip in clips for thing in clip.things}
    assert len(lives) == 4


def test_the_vocabulary_of_pictures_stays():
    assert [word for word in CLIP_VOCABULARY[:128] if word in TOKEN_ID][:122] == list(TOKEN_ID)[:122]
    assert len(CLIP_TOKEN_ID) == len(CLIP_VOCABULARY) == 144


def fitting(clip, words):
    """The things that the words describe."""
    wanted = set(words) & {*SIZE_NAMES, *COLOR_NAMES, *SHAPES}
    return [
        thing
        for thing in clip.things
        if wanted <= {SIZE_NAMES[thing.size], COLOR_NAMES[thing.color], SHAPES[thing.shape]}
    ]


def times_of(thing):
    return [time for time in range(FRAMES) if thing.box(time) is not None]


def spots(thing, times):
    """The cells it is in, as answers."""
    boxes = [thing.box(time) for time in times]
    return {f"row {(b.top + b.bottom) // 2 // 16} col {(b.left + b.right) // 2 // 16}" for b in boxes if b}


def ways(thing):
    """The directions in which it goes from one frame to the next."""
    corners = [thing.box(time)[:2] for time in times_of(thing)]
    steps = {(int(np.sign(b[1] - a[1])), int(np.sign(b[0] - a[0]))) for a, b in pairwise(corners)}
    return {name for name, way in WAYS.items() if way in steps}


def answers_to(clip, words):
    """All the answers that a question has by what is seen in the clip: one, if it is a good question."""
    times = [int(words[words.index("time") + 1])] if "time" in words else range(FRAMES)
    fits = fitting(clip, words)
    here = [thing for thing in fits if set(times) & set(times_of(thing))]
    match words[:2]:
        case ["where", "does"]:
            return {way for thing in fits for way in ways(thing)}
        case ["where" | "find", _]:
            return set().union(*(spots(thing, times) for thing in fits))
        case ["when", _]:
            choose = min if "first" in words else max
            return {f"time {choose(times_of(thing))}" for thing in fits}
        case ["how", _]:
            return {f"{len(here)} objects"}
        case ["is", _]:
            return {"yes" if here else "no"}
        case ["what", "does"]:
            found = [thing for thing in clip.things if ways(thing) and ways(thing) >= set(words) & set(WAYS)]
        case ["what", _]:
            spot = " ".join(words[3:7])
            found = [thing for thing in clip.things if spot in spots(thing, times)]
    return {f"{SIZE_NAMES[t.size]} {COLOR_NAMES[t.color]} {SHAPES[t.shape]}" for t in found}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_question_has_one_right_answer(family, clips):
    asked = 0
    for seed, clip in zip(SEEDS, clips, strict=True):
        rng = np.random.default_rng((seed, 1))
        for _ in range(4):
            question = ask_clip(clip, family, rng)
            if question is None:
                continue
            asked += 1
            words, answer = list(question.words), " ".join(question.answer)
            if words[0] in ("where", "find", "when"):
                assert len(fitting(clip, words)) == 1, (seed, words)
            assert answers_to(clip, words) == {answer}, (seed, words)
            assert all(word in CLIP_TOKEN_ID for word in (*words, *question.answer))
            for time, box in question.seen:
                assert any(thing.box(time) == box for thing in clip.things)
    assert asked > 40


def test_what_is_asked_is_not_answered_by_one_word_always(clips):
    """No family has an answer that is right in more than six of ten questions."""
    for family in FAMILIES:
        rng = np.random.default_rng(1)
        draws = [ask_clip(clip, family, rng) for clip in clips for _ in range(3)]
        answers = [question.answer for question in draws if question is not None]
        assert max(answers.count(answer) for answer in set(answers)) < 0.6 * len(answers), family


def test_make_clips_writes_what_it_says(tmp_path, monkeypatch):
    out = tmp_path / "set"
    monkeypatch.setattr("sys.argv", ["make", "--seeds", "70001:70003", "--out", str(out)])
    main()
    lines = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert {path.name for path in out.iterdir()} == {"clip_70001", "clip_70002", "questions.jsonl"}
    assert lines == [entry for seed in (70001, 70002) for _, entry in clip_questions_of(seed)]
    assert len({line["id"] for line in lines}) == len(lines)
    for line in lines:
        assert set(line) - {"seen"} == {"id", "video", "family", "prompt", "answer"}
        clip = make_clip(int(line["id"].split("-")[0]))
        assert np.array_equal(read_clip(out / line["video"]), clip.frames)
        assert answers_to(clip, line["prompt"].split()) == {line["answer"]}

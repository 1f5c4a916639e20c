"""Questions: every answer is checked against the scene by a second reading of the question's words."""

import json
from pathlib import Path

import numpy as np
import pytest
from make_questions import clutter_share, main, questions_of, seed_range
from PIL import Image
from world.questions import ask
from world.scenes import SIDES, make_scene
from world.words import COLOR_NAMES, FAMILIES, LETTERS, SHAPES, SIZE_NAMES, SIZES

GROWN = 1.75  # how much larger a large object may be among clutter
IMAGES = Path(__file__).parents[2] / "examples" / "glyphworld" / "images"


def fitting(scene, words):
    """Boxes of what the words describe; sizes are measured, not read from the scene."""
    if "sign" in words:
        return [scene.sign.box]
    found = []
    for thing in scene.things:
        left, top, right, bottom = thing.box
        low, high = SIZES[SIZE_NAMES[thing.size]]
        if SIZE_NAMES[thing.size] == "large":
            high = round(GROWN * high)
        assert low <= max(right - left, bottom - top) <= high
        said = {SIZE_NAMES[thing.size], COLOR_NAMES[thing.color], SHAPES[thing.shape]}
        wanted = set(words) & {*SIZE_NAMES, *COLOR_NAMES, *SHAPES}
        if wanted <= said:
            found.append(thing.box)
    return found


def place(scene, box):
    """Row and column on the 7 x 7 grid, and corners in steps, from pixels."""
    width = {112: 16, 192: 28}[scene.image.shape[0]]
    step = {112: 4, 192: 6}[scene.image.shape[0]]
    left, top, right, bottom = box
    corners = [left // step, top // step, (right + step - 1) // step, (bottom + step - 1) // step]
    return ["row", str((top + bottom) // 2 // width), "col", str((left + right) // 2 // width)], corners


def is_right(scene, words, answer):
    """Whether ``answer`` answers the question ``words``, and only one thing can be meant."""
    match words[0]:
        case "locate" | "box":
            (box,) = fitting(scene, words)
            return answer == [str(corner) for corner in place(scene, box)[1]]
        case "where" | "find":
            (box,) = fitting(scene, words)
            return answer == place(scene, box)[0]
        case "how":
            return answer == [str(len(fitting(scene, words))), "objects"]
        case "is":
            return answer == ["yes" if fitting(scene, words) else "no"]
        case "which":
            (box,) = fitting(scene, words)
            return fitting(scene, [*words, answer[-1]]) == [box] and answer[:3] == ["it", "is", "a"]
        case "read":
            return answer == [LETTERS[i] for i in scene.sign.letters]
    match words[1]:
        case "color":
            (box,) = fitting(scene, words)
            return fitting(scene, [*words, answer[-1]]) == [box] and answer[:2] == ["it", "is"]
        case "is":
            here = [t for t in scene.things if place(scene, t.box)[0] == words[3:7]]
            return len(here) == 1 and here[0].box in fitting(scene, answer) and len(answer) == 3
        case "does":
            return answer == [LETTERS[i] for i in scene.sign.letters]
    return False


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clutter", [0.0, 1.0])
def test_every_answer_is_true(family, side, clutter):
    asked = 0
    for seed in range(30):
        scene = make_scene(seed, side, clutter)
        rng = np.random.default_rng((seed, 1))
        for _ in range(4):
            question = ask(scene, family, rng)
            if question is not None:
                asked += 1
                assert question.family == family
                assert is_right(scene, list(question.words), list(question.answer)), (seed, question)
    assert asked > 30


def test_the_check_notices_a_wrong_answer():
    scene = make_scene(70001)
    words = ["how", "many", "objects", "are", "there", "?"]
    assert is_right(scene, words, [str(len(scene.things)), "objects"])
    assert not is_right(scene, words, [str(len(scene.things) + 1), "objects"])


def test_shipped_questions_are_true():
    for entry in json.loads((IMAGES / "questions.json").read_text()):
        scene = make_scene(entry["seed"])
        for qa in entry["qa"]:
            words = qa["prompt"].removeprefix("<bos> USER: <image> ").removesuffix(" ASSISTANT:").split()
            assert is_right(scene, words, qa["answer"].split()), (entry["seed"], qa)


@pytest.mark.parametrize("clutter", [0.0, 1.0])
def test_make_questions_writes_what_it_says(tmp_path, monkeypatch, clutter):
    out, seeds = tmp_path / "set", "70001:70003"
    asked = ["make", "--seeds", seeds, "--out", str(out), "--boxes", "2", "--clutter", str(clutter)]
    monkeypatch.setattr("sys.argv", asked)
    main()
    lines = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert {path.name for path in out.iterdir()} == {"scene_70001.png", "scene_70002.png", "questions.jsonl"}
    assert lines == [entry for seed in (70001, 70002) for _, entry in questions_of(seed, 112, 2, clutter)]
    assert len({line["id"] for line in lines}) == len(lines)
    assert [line["family"] for line in lines].count("box") == 4
    for line in lines:
        assert set(line) - {"box"} == {"id", "image", "family", "prompt", "answer"}
        scene = make_scene(int(line["id"].split("-")[0]), clutter=clutter)
        assert np.array_equal(np.asarray(Image.open(out / line["image"])), scene.image)
        assert is_right(scene, line["prompt"].split(), line["answer"].split())


@pytest.mark.parametrize("text", ["5", "5:5", "6:5", "a:b", "-1:3"])
def test_refuses_other_seeds(text):
    with pytest.raises(Exception, match=f"expected FIRST:END with FIRST < END, got '{text}'"):
        seed_range(text)


@pytest.mark.parametrize("text", ["much", "-0.5", "1.1", "nan"])
def test_refuses_other_clutter(text):
    with pytest.raises(Exception, match=f"expected a number within 0 and 1, got '{text}'"):
        clutter_share(text)

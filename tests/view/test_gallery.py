"""The gallery: what is asked and drawn, and what the files say."""

import json

import pytest
from PIL import Image

from helpers.command_line import CHECKPOINT, SCENE
from vlmprune.checkpoints import Checkpoint
from vlmprune.errors import InputError
from vlmprune.eval.questions import Question
from vlmprune.eval.scoring import judge
from vlmprune.policies.recipe import policy_from
from vlmprune.view.fitting import Size
from vlmprune.view.gallery import fit_all, make_gallery, ready
from vlmprune.view.outcome import run_once
from vlmprune.view.sheets import RIGHT, WRONG, Frame


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint(str(CHECKPOINT), device="cpu", dtype="float32")


SIZE = Size(layers=8, tower=4, visual=196)


def write_questions(folder, lines):
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def gallery(checkpoint, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("questions"), tmp_path_factory.mktemp("gallery")
    image = str(SCENE)
    phone = {
        "id": "phone",
        "image": image,
        "family": "box",
        "prompt": "locate the green phone .",
        "answer": "9 11 12 14",
    }
    never = {
        "id": "never",
        "image": image,
        "family": "read",
        "prompt": "locate the green phone .",
        "answer": "never",
    }
    write_questions(folder, [phone, never])
    told = make_gallery(checkpoint, folder, out, budgets=(98, 20), methods=("fastv", "divprune"))
    found = json.loads((out / "gallery.json").read_text())
    assert found == json.loads(json.dumps(told)) and found["left_out"] == []
    return out, found


def test_every_answer_is_what_its_policy_gives_when_asked_again(gallery, checkpoint):
    _, told = gallery
    assert len(told["answers"]) == 2 + 2 * 2 * 2
    for one in told["answers"]:
        asked = next(q for q in told["questions"] if q["id"] == one["question"])
        scene = ready(checkpoint, Question(asked["id"], SCENE, "", asked["prompt"], asked["answer"]))
        policy = policy_from(one["policy"]) if one["policy"] else None
        again = run_once(checkpoint, scene.inputs, None, policy, 16)
        assert again.answer == one["answer"]
        assert again.report.tokens.mean_per_layer == one["mean"]
        assert list(again.kept[-1] if again.kept else range(196)) == one["kept"]
        assert one["right"] == judge(again.answer, asked["answer"])[0]
    assert [one["right"] for one in told["answers"][:2]] == [
        True,
        False,
    ]  # unpruned: the phone, and what nobody says


def test_budgets_are_met_or_said_not_to_be(gallery):
    for one in gallery[1]["answers"]:
        if one["budget"] is None:
            assert (one["method"], one["mean"], one["meets"]) == ("", 196, True)
        elif one["meets"]:
            assert one["budget"] - 2 <= one["mean"] <= one["budget"]
        else:  # FastV sees all in the first of eight layers
            assert (one["method"], one["budget"]) == ("fastv", 20) and one["mean"] > 20
            assert len(one["kept"]) == 20


def test_pictures_are_there(gallery):
    out, told = gallery
    assert {p.name for p in out.iterdir()} == {"gallery.json", "sheet.webp", "fastv.webp", "divprune.webp"}
    width, height = Image.open(out / "fastv.webp").size
    assert width > 3 * 192 and height > 2 * 192
    assert told["visual_tokens"] == 196 and told["layers"] == 8


def test_a_frame_dims_what_was_dropped_and_shows_whether_the_answer_is_right():
    image = Image.new("RGB", (8, 8), (200, 200, 200))
    for right, edge in ((True, RIGHT), (False, WRONG)):
        drawn = Frame(image, (2, 2), frozenset({3}), "1 of 4", False, "yes", right).drawn(70)
        assert drawn.size == (70, 70)
        assert drawn.getpixel((0, 0)) == edge
        assert drawn.getpixel((60, 60)) == (200, 200, 200)
        assert max(drawn.getpixel((10, 10))) < 80


def test_without_names_all_that_can_be_fitted_are_drawn(checkpoint):
    """Those that have to be given settings are told with the reason; nothing is run for that here."""
    fitted, left_out = fit_all(["divprune", "sgl", "vtw", "evs"], [64.0], SIZE, given=False)
    assert set(fitted) == {"divprune"} and set(left_out) == {"sgl", "vtw", "evs"}
    assert left_out["evs"] == "evs: made for video"
    assert set(fit_all(["evs"], [64.0], SIZE, given=True)[0]) == {"evs"}
    assert "guide" in left_out["sgl"] and "share" in left_out["vtw"]


def test_the_size_of_a_checkpoint(checkpoint):
    assert ready(checkpoint, Question("1", SCENE, "", "what is it ?", "")).size == SIZE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": ("sgl",)}, "guide"),
        ({"methods": ("nothing",)}, "nothing"),
        (
            {"budgets": (197, 64)},
            "budgets: expected different numbers of visual tokens from 1 to 196, got 197, 64",
        ),
        ({"budgets": (64, 64)}, "budgets: expected different numbers"),
        ({"budgets": (0.5,)}, "budgets: expected different numbers"),
        ({"budgets": ()}, "budgets: expected different numbers"),
        ({"budgets": (float("nan"),), "methods": ()}, "budgets: expected different numbers"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(checkpoint, tmp_path, change, message):
    out, image = tmp_path / "out", str(SCENE)
    write_questions(tmp_path, [{"id": "1", "image": image, "family": "a", "prompt": "p", "answer": "a"}])
    with pytest.raises(InputError, match=message):
        make_gallery(checkpoint, tmp_path, out, **({"methods": ("divprune",)} | change))
    assert not out.exists()

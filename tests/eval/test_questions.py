"""Reading a folder of questions, and what is said about one that cannot be read."""

import json

import pytest
from PIL import Image

from vlmprune.eval.questions import read_questions

GOOD = {"id": "1", "image": "a.png", "family": "box", "prompt": "locate it", "answer": "1 2 3 4"}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def make(*lines):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "questions.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return tmp_path

    return make


def test_reads_in_order(folder):
    other = GOOD | {"id": "2", "family": "color", "prompt": "line\u2028break", "box": [1, 1, 3, 4.5]}
    first, second = read_questions(folder(GOOD, "", other))
    assert (first.id, first.family, first.answer) == ("1", "box", "1 2 3 4")
    assert first.image.name == "a.png" and first.image.is_file()
    assert second.prompt == "line\u2028break"
    assert first.box is None and first.region is None
    assert second.box == (1, 1, 3, 4.5) and second.size == (4, 4)
    assert second.region == (0.25, 0.25, 0.75, 1.0)  # cut off at the edge of the image


def test_without_labels(folder):
    bare = {k: GOOD[k] for k in ("id", "image", "prompt")}
    first, second = read_questions(folder(bare, GOOD | {"id": "2"}), labelled=False)
    assert (first.prompt, first.family, first.answer) == ("locate it", "", "")
    assert (second.family, second.answer) == ("box", "1 2 3 4")
    with pytest.raises(ValueError, match=r"line 1: expected a text as 'answer', got 5$"):
        read_questions(folder(bare | {"answer": 5}), labelled=False)
    with pytest.raises(ValueError, match=r"line 1: expected a text as 'prompt', got ''$"):
        read_questions(folder(bare | {"prompt": ""}), labelled=False)
    with pytest.raises(ValueError, match=r"line 1: expected a text as 'family', got None$"):
        read_questions(folder(bare))


def test_families(folder):
    here = folder(GOOD, GOOD | {"id": "2", "family": "color"}, GOOD | {"id": "3", "family": "at"})
    assert [q.id for q in read_questions(here, ["at", "box"])] == ["1", "3"]
    with pytest.raises(
        ValueError, match=r"^families: expected one of at, box, color, got 'boxes' \(did you mean 'box'\?\)$"
    ):
        read_questions(here, ["box", "boxes"])


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", r"^questions.jsonl line 2: expected a JSON object, got '\{'$"),
        ("[1]", r"^questions.jsonl line 2: expected a JSON object, got \[1\]$"),
        ({k: v for k, v in GOOD.items() if k != "answer"}, r"line 2: expected a text as 'answer', got None$"),
        (GOOD | {"id": 2}, r"line 2: expected a text as 'id', got 2$"),
        (GOOD | {"id": "2", "prompt": ""}, r"line 2: expected a text as 'prompt', got ''$"),
        (GOOD | {"id": "2", "image": "b.png"}, r"line 2: expected an image file in the folder, got 'b.png'$"),
        (
            GOOD | {"box": [1, 2, 3]},
            r"line 2: expected four numbers as 'box', got \[1, 2, 3\]$",
        ),
        (GOOD, r"^questions: expected every id once, got '1' twice$"),
    ],
)
def test_malformed_line(folder, line, said):
    with pytest.raises(ValueError, match=said):
        read_questions(folder(GOOD, line))


def test_no_image(folder):
    here = folder(GOOD)
    (here / "a.png").write_text("not pixels")
    said = r"^questions: expected an image file, got .*a.png', which cannot be read: cannot identify"
    with pytest.raises(ValueError, match=said):
        read_questions(here)
    other = GOOD | {"id": "2", "family": "color", "image": "b.png"}
    Image.new("RGB", (4, 4)).save(here / "b.png")
    (question,) = read_questions(folder(GOOD, other), ["color"])  # the damaged one is not asked about
    assert question.image.name == "b.png"


def test_size_is_that_of_the_upright_image(folder):
    here = folder(GOOD | {"box": [0, 0, 2, 4]})
    sideways = Image.Exif()
    sideways[0x0112] = 6
    Image.new("RGB", (8, 4)).save(here / "a.png", exif=sideways)
    (question,) = read_questions(here)
    assert question.size == (4, 8) and question.region == (0.0, 0.0, 0.5, 0.5)


def test_no_questions(folder, tmp_path):
    with pytest.raises(ValueError, match=r"^questions: expected a folder with a questions.jsonl, got"):
        read_questions(tmp_path / "none")
    with pytest.raises(ValueError, match=r"^questions: expected at least one line in .*, got none$"):
        read_questions(folder())


def test_not_utf8(folder):
    here = folder(GOOD)
    (here / "questions.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"questions.jsonl: expected UTF-8 text, got"):
        read_questions(here)


CLIP = {"id": "1", "video": "clip", "family": "when", "prompt": "when does it go ?", "answer": "time 3"}


@pytest.fixture
def clip(folder, tmp_path):
    frames = tmp_path / "clip"
    frames.mkdir()
    for i in range(3):
        Image.new("RGB", (6, 4), (i, 0, 0)).save(frames / f"{i}.png")
    first = Image.new("RGB", (5, 5))
    first.save(tmp_path / "clip.gif", save_all=True, append_images=[Image.new("RGB", (5, 5), (9, 9, 9))])
    return folder


def test_clips(clip):
    first, second = read_questions(clip(CLIP, CLIP | {"id": "2", "video": "clip.gif"}))
    assert (first.kind, first.size, len(first.pictures())) == ("video", (6, 4), 3)
    assert (second.kind, second.size, len(second.pictures())) == ("video", (5, 5), 2)
    assert [frame.getpixel((0, 0))[0] for frame in first.pictures()] == [0, 1, 2]


@pytest.mark.parametrize(
    "lines, said",
    [
        (
            [CLIP, GOOD | {"id": "2"}],
            r"^questions: expected all of them about images, or all about clips, got both$",
        ),
        ([CLIP | {"image": "a.png"}], r"line 1: expected a text as 'image' or as 'video', got both$"),
        (
            [CLIP | {"video": "none"}],
            r"line 1: expected an animation or a folder of frames in the folder, got 'none'$",
        ),
        ([CLIP | {"video": "a.png"}], r"^questions: expected two or more pictures, got 1 in '.*a\.png'$"),
        ([CLIP | {"box": [0, 0, 1, 1]}], r"line 1: expected no 'box' beside 'video', got \[0, 0, 1, 1\]$"),
    ],
)
def test_what_is_no_question_about_a_clip(clip, lines, said):
    with pytest.raises(ValueError, match=said):
        read_questions(clip(*lines))

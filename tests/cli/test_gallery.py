"""``vlmprune gallery``: files, the table of right answers, what is left out, and bad input, on the small trained model."""

import json

import pytest

from helpers.command_line import CHECKPOINT, SCENE, cli

SAID = {"id": "phone", "image": str(SCENE), "family": "box", "prompt": "locate the green phone ."}


@pytest.fixture
def gallery(tmp_path):
    line = json.dumps(SAID | {"answer": "9 11 12 14"})
    (tmp_path / "questions.jsonl").write_text(line + "\n")
    files = ("--questions", tmp_path, "--out", tmp_path / "out")
    settings = ("--model", CHECKPOINT, "--device", "cpu", "--dtype", "float32")
    return lambda *args: cli("gallery", *settings, *files, *args)


def test_files_and_the_table(gallery, tmp_path):
    done = gallery("--method", "fastv", "--method", "divprune", "--budgets", "98,20")
    assert done.exit_code == 0 and done.stderr == ""
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "gallery.json",
        "sheet.webp",
        "fastv.webp",
        "divprune.webp",
    }
    answers = json.loads((out / "gallery.json").read_text())["answers"]
    right = {(one["method"], one["budget"]): int(one["right"]) for one in answers}
    # FastV's first layer alone, of eight, costs 24.5 of 196 tokens: it cannot meet 20
    rows = {
        "unpruned": f"{right['', None]} {right['', None]}",
        "fastv": f"{right['fastv', 98]} {right['fastv', 20]}*",
        "divprune": f"{right['divprune', 98]} {right['divprune', 20]}",
    }
    shown = {name: " ".join(cells) for name, *cells in (line.split() for line in _rows(done.stdout))}
    assert right["", None] == 1 and rows.items() <= shown.items()
    assert str(out / "sheet.webp") in "".join(done.stdout.split("\n"))


def _rows(text):
    """Its lines without what draws the table."""
    plain = (line.translate(str.maketrans("│┃", "  ")) for line in text.splitlines())
    return [line for line in plain if line.strip()]


@pytest.mark.parametrize(
    "args, said",
    [
        (("--budgets", "64,x"), "--budgets: expected numbers separated by commas, got '64,x'"),
        (("--budgets", "64,64"), "--budgets: expected different numbers of visual tokens from 1 to 196"),
        (("--method", "fastvv"), "got 'fastvv' (did you mean 'fastv'?)"),
    ],
)
def test_bad_input_is_one_line(gallery, tmp_path, args, said):
    done = gallery(*args)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert said in done.stderr and not (tmp_path / "out").exists()

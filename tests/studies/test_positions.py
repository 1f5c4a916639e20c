"""The study of positions: pairs that differ in nothing else, rows by hand, a run from end to end."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from common import rows
from positions import arms, study, tables

from vlmprune import ops
from vlmprune.eval import Answer, Question
from vlmprune.eval.arms import Arm, PromptSize, cut_of
from vlmprune.eval.intervals import bootstrap
from vlmprune.flops import DecoderShape
from vlmprune.policies import DivPrune
from vlmprune.policies.registry import BUILT_IN

EXAMPLE = Path(__file__).parents[2] / "examples" / "glyphworld"
SHAPE = DecoderShape(layers=8, hidden=256, heads=4, kv_heads=4, head_dim=64, intermediate=384)
PROMPT = PromptSize(SHAPE, 576, 9)


@pytest.fixture(autouse=True)
def reference():
    """Kernels have their own tests; interpreted they are slow."""
    with ops.use_backend("reference"):
        yield


@pytest.mark.parametrize("depth, tower", [(8, 4), (28, 24), (32, 24)])
def test_every_method_that_could_do_both_when_it_was_made_is_asked(depth, tower):
    can = {name for name, kind in BUILT_IN.items() if "positions" in kind.__dataclass_fields__}
    texts, left_out = arms.methods(depth, tower)
    asked = {text.partition(":")[0] for text in texts}
    assert asked < can and len(asked) == 13 and not left_out


def test_layers_are_the_papers_at_32():
    texts, _ = arms.methods(32, 24)
    assert "vscan:layer=16,shallow_layer=5" in texts and "pyramiddrop:layers=8/16/24" in texts


def test_a_shallow_model_is_asked_less_and_says_why():
    texts, left_out = arms.methods(2, 2)
    assert "divprune" in texts and "vtw:layer=1" in texts and not any("pyramiddrop" in text for text in texts)
    assert left_out and all(": expected" in line for line in left_out)
    made, _ = arms.make_arms(texts, (0.5,), replace(PROMPT, shape=replace(SHAPE, layers=2)))
    assert all(arm.policy is None or arm.policy.layers[-1] < 2 for arm in made)


def test_the_two_of_a_pair_differ_in_positions_alone_and_cost_the_same():
    made, refused = arms.make_arms(arms.methods(8, 4)[0], study.BUDGETS, PROMPT)
    first, *others = made
    assert first.policy is None and len(others) % 2 == 0
    for kept, packed in zip(others[::2], others[1::2], strict=True):
        assert (kept.policy.positions, packed.policy.positions) == ("keep", "pack")
        assert replace(kept.policy, positions="pack") == packed.policy
        assert kept.budget == packed.budget and cut_of(kept, PROMPT) == cut_of(packed, PROMPT)
        assert kept.budget is None or cut_of(kept, PROMPT) >= kept.budget
    asked = {(arm.method.rpartition(" ")[0], arm.budget) for arm in others}
    assert {("divprune", 0.94), ("pyramiddrop:layers=1/2/4", 0.83), ("vtw:layer=2", None)} <= asked
    assert any(line.startswith("pyramiddrop:layers=2/4/6 keep at budget 0.83: cut:") for line in refused)


def test_rows_and_tables_by_hand():
    """Two budgets, two families of one question each; packed all wrong at the first budget."""
    questions = [Question(f, Path("a.png"), f, "?", "x") for f in ("box", "read")]
    some = [Arm("unpruned")]
    right = {"unpruned": (1, 1)}
    for budget, keep, told in ((0.5, 9, ((1, 1), (0, 0))), (0.9, 3, ((1, 0), (0, 0)))):
        for part, values in zip(("keep", "pack"), told, strict=True):
            some.append(Arm(f"divprune {part}", budget, DivPrune(keep=keep, positions=part)))
            right[some[-1].key] = values
    answers = {}
    for arm in some:
        for question, value in zip(questions, right[arm.key], strict=True):
            key = (arm.key, question.id, 0)
            answers[key] = Answer(*key, "x", bool(value), False, arm.budget or 0.0, 9.0, 0.0, ())
    found = [*tables.make_rows("m", some, questions, answers)]

    def one(**wanted):
        (row,) = rows.find(found, **wanted)
        return row

    assert one(part="keep", budget=0.9, family="").mean == 0.5
    assert one(part="pack", budget=0.9, family="box").note.startswith("cut 0.9000, DivPrune(")
    gain = one(part="keep minus pack", budget=0.9, family="")
    assert gain.estimate == pytest.approx(bootstrap([1.0, 0.0])) and gain.n == 2
    assert one(part="keep minus pack", budget=None, family="read").mean == 0.5  # of 1 and 0
    text = tables.tables(found)
    assert "**m**: 2 questions, unpruned 100.0 [34.2, 100.0]" in text
    assert (
        "| `divprune` | 0.0 -> 100.0: **+100.0 [+100.0, +100.0]** | 0.0 -> 50.0: +50.0 [+0.0, +100.0] |"
        in text
    )
    assert text.endswith("| keep minus pack | box | read |\n| --- | --- | --- |\n" + text.splitlines()[-1])


@pytest.fixture
def questions(tmp_path):
    """Two questions about two scenes."""
    (tmp_path / "q").mkdir()
    lines = []
    for entry in json.loads((EXAMPLE / "images" / "questions.json").read_text())[:2]:
        shutil.copy(EXAMPLE / "images" / entry["image"], tmp_path / "q")
        lines.append({"id": entry["image"], "image": entry["image"]} | entry["qa"][0])
    (tmp_path / "q" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "q"


def test_from_end_to_end(questions, tmp_path, monkeypatch, capsys):
    out, table = tmp_path / "out", tmp_path / "all.csv"
    args = ["--model", EXAMPLE / "checkpoint", "--questions", questions, "--out", out, "--csv", table]
    args += ["--name", "tiny", "--device", "cpu", "--budgets", 0.6, "--methods", "divprune", "vtw:layer=2"]
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, args)])
    assert study.main() == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "| method | 60% cut | mean of the differences |" in said and "| `vtw:layer=2` (cut 0." in said
    with table.open() as file:
        parts = {(line["method"], line["part"]) for line in csv.DictReader(file) if line["model"] == "tiny"}
    both = {(m, p) for m in ("divprune", "vtw:layer=2") for p in ("keep", "pack", "keep minus pack")}
    assert parts == {("unpruned", ""), *both}
    asked = (out / "answers.jsonl").read_bytes()
    assert study.main() == 0
    assert (out / "answers.jsonl").read_bytes() == asked  # nothing was asked again
    monkeypatch.setattr("sys.argv", ["study.py", "--tables", str(table)])
    capsys.readouterr()
    assert study.main() == 0 and capsys.readouterr().out == said


def test_a_method_without_positions_is_one_line(questions, tmp_path, monkeypatch, capsys):
    args = ["--model", EXAMPLE / "checkpoint", "--questions", questions, "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, args), "--methods", "fastv"])
    assert study.main() == 2
    expected = "error: methods: expected some with a setting 'positions', got 'fastv'\n"
    assert capsys.readouterr().err.endswith(expected) and not (tmp_path / "out").exists()


def test_the_readme_shows_the_rows():
    folder = Path(study.__file__).parent
    shown = (folder / "README.md").read_text().partition("<!-- tables -->\n")[2].partition("<!-- end -->")[0]
    assert shown == tables.tables(rows.load(folder / "glyphworld.csv")) + "\n"

"""The study of where to look: arms and their budgets, paired differences by hand, tables from rows, a run from end to end."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from common.rows import Row, load, row
from where_to_look import arms, measure, passes, pictures, plot, study, tables

from vlmprune import FastV, Uniform, ops
from vlmprune.errors import InputError
from vlmprune.eval import Answer, Checkpoint, Question
from vlmprune.eval.arms import UNPRUNED, Arm, PromptSize
from vlmprune.eval.intervals import bootstrap, proportion
from vlmprune.eval.page import percent, points
from vlmprune.flops import DecoderShape

EXAMPLE = Path(__file__).parents[2] / "examples" / "glyphworld"
PROMPT = PromptSize(
    DecoderShape(layers=8, hidden=256, heads=4, kv_heads=4, head_dim=64, intermediate=384), 576, 9
)


@pytest.fixture(autouse=True)
def reference():
    """Kernels have their own tests; interpreted they are slow."""
    with ops.use_backend("reference"):
        yield


def test_every_published_method_stands_where_it_can():
    """Layers are the paper's shares of the depth; whoever can keep or pack does both."""
    methods, left_out = arms.published(8, 4)
    assert not left_out and arms.published(1, 1)[1]
    assert methods["FastV"].layers == (2,) and methods["PyramidDrop, keep"].layers == (2, 4, 6)
    assert arms.published(32, 24)[0]["PyramidDrop, keep"].layers == (8, 16, 24)
    assert methods["VScan, keep"].shallow_layer == 1
    assert {"DART", "SparseVLM+", "AIM, keep", "FasterVLM, pack"} < methods.keys()
    for name, policy in methods.items():
        where = policy.positions if "positions" in policy.__dataclass_fields__ else None
        assert where is None or name.endswith(where)
    kept = {name.removesuffix(", keep") for name in methods if name.endswith(", keep")}
    assert kept == {name.removesuffix(", pack") for name in methods if name.endswith(", pack")}
    assert {"DivPrune", "CDPruner", "VisPruner", "VisionZip", "VScan", "SparseVLM"} < kept


def test_arms_meet_their_budgets_or_say_why_not():
    found, refused = arms.study_arms({"Scout": Uniform(layer=0)}, (0.64, 0.94), PROMPT, 4, 2)
    assert found[0].method == UNPRUNED and [a.method for a in found[1:3]] == ["Scout", "Scout"]
    assert [a.seed for a in found if a.method == "random" and a.budget == 0.94] == [0, 1]
    assert {a.smaller.keep for a in found if a.smaller} == {0.439, 0.074}
    assert any(line.startswith("FastV, early at budget 0.94: cut: expected a share") for line in refused)
    assert not any(a.budget == 0.94 for a in found if a.method.startswith(("FastV", "PyramidDrop")))
    few, _ = arms.study_arms({}, (0.64,), PROMPT, 4, 1, ["DivPrune", "lattice"])
    assert [a.method for a in few] == [UNPRUNED, "lattice", "DivPrune, keep", "DivPrune, pack"]
    with pytest.raises(InputError, match=r"^only: expected beginnings of lattice, .*, got Divprune$"):
        arms.study_arms({}, (0.64,), PROMPT, 4, 1, ["Divprune"])


def measured():
    """Rows of four questions, of which Scout answers 3, FastV 1 and 2 in two draws, the unpruned model 4."""
    questions = [Question(str(i), Path("a.png"), "box" if i < 2 else "at", "?", "a") for i in range(4)]
    said = {
        ("Scout", 0): "1110",
        ("FastV", 0): "1000",
        ("FastV", 1): "1001",
        (UNPRUNED, 0): "1111",
    }
    policies = {"Scout": Uniform(layer=0), "FastV": FastV(), UNPRUNED: None}
    some, answers = [], {}
    for (method, seed), right in said.items():
        arm = Arm(method, None if method == UNPRUNED else 0.83, policies[method], seed)
        some.append(arm)
        for question, is_right in zip(questions, right, strict=True):
            key = (arm.key, question.id, seed)
            answers[key] = Answer(*key, "", is_right == "1", False, 0.84, 9.0, 0.01, ((0, "1"),))
    return [*measure.study_rows("world", some, questions, answers)]


def test_rows_and_differences_by_hand():
    rows = measured()

    def one(**wanted: object) -> Row:
        (found,) = [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]
        return found

    assert one(method="Scout", quantity="right", family="").estimate == pytest.approx(
        proportion([1, 1, 1, 0]), abs=1e-4
    )
    assert one(method="FastV", quantity="right", family="at").mean == 0.25
    assert one(method="FastV", quantity="cut").mean == 0.84
    gain = one(method="Scout", quantity=measure.gain_over("FastV"))
    assert gain.estimate == pytest.approx(bootstrap([0, 1, 1, -0.5]), abs=1e-4) and gain.n == 4
    assert one(method="Scout", quantity=measure.gain_over(UNPRUNED)).mean == -0.25
    assert not [r for r in rows if r.method != "Scout" and "minus" in r.quantity]


def test_tables_by_hand():
    def one(method: str, quantity: str, *values: float) -> Row:
        named = {"model": "world", "part": "budget", "method": method, "quantity": quantity}
        return row(bootstrap(values), len(values), budget=0.94, **named)

    more = [one("Scout", "right", 1, 0), one("lattice", "right", 0)]
    rows = [*measured(), *more, one("Scout", measure.gain_over("lattice"), 0.2, 0.3)]
    text = tables.tables(rows, "world")
    assert "| FLOPs cut | 83% | 94% |" in text
    assert f"| FastV | {percent(bootstrap([1, 0, 0, 0.5]))} | - |" in text
    assert f"| FastV | {points(bootstrap([0, 1, 1, -0.5]))} | - |" in text
    assert "| lattice | - | **+25.0 [+20.0, +30.0]** |" in text
    assert (
        "By family at a cut of 83%:" in text
        and "| method | box | at |" in text
        and "| Scout | 100 | 50 |" in text
    )


def test_a_page_is_brought_up_to_date_between_its_markers():
    rows = measured()
    page = "before\n<!-- tables of world: begin -->\nold\n<!-- tables of world: end -->\nafter\n"
    new = tables.with_tables(page, rows)
    assert new.startswith("before\n<!-- tables of world: begin -->\n**world**, 4 questions")
    assert new.endswith("<!-- tables of world: end -->\nafter\n") and "old" not in new
    assert tables.with_tables(new, rows) == new
    with pytest.raises(ValueError, match=r"expected <!-- tables of world: begin --> and"):
        tables.with_tables("nothing", rows)


def test_the_plot_has_a_panel_for_each_world():
    rows = measured()
    one = plot.draw_plot(rows)
    both = plot.draw_plot([*rows, *(Row(**vars(r) | {"model": "other"}) for r in rows)])
    assert one[:4] == both[:4] == b"\x89PNG" and int.from_bytes(one[16:20]) < int.from_bytes(both[16:20])


def test_the_readme_has_a_place_for_both_worlds():
    page, names = tables.PAGE.read_text(encoding="utf-8"), ("glyphworld-576", "glyphworld-576-clutter")
    rows = [Row(**vars(r) | {"model": name}) for name in names for r in measured()]
    assert all(f"**{name}**, 4 questions" in tables.with_tables(page, rows) for name in names)


def test_the_readme_says_what_the_rows_say():
    """And nothing of worlds that have no rows."""
    page = tables.PAGE.read_text(encoding="utf-8")
    bare = re.sub(r"(<!-- tables of \S+: begin -->\n).*?(<!-- tables of)", r"\1\2", page, flags=re.DOTALL)
    rows = load(tables.ROWS) if tables.ROWS.exists() else []
    assert tables.with_tables(bare, rows) == page


@pytest.fixture
def questions(tmp_path):
    """Three questions about two scenes."""
    (tmp_path / "q").mkdir()
    lines = []
    for entry in json.loads((EXAMPLE / "images" / "questions.json").read_text())[:2]:
        shutil.copy(EXAMPLE / "images" / entry["image"], tmp_path / "q")
        asked = next(x for x in entry["qa"] if x["family"] == "box")
        box = [4 * int(word) for word in asked["answer"].split()]
        lines.append({"id": entry["image"], "image": entry["image"], "box": box} | asked)
        asked = next(x for x in entry["qa"] if x["family"] == "count")
        lines.append({"id": f"{entry['image']}-count", "image": entry["image"]} | asked)
    (tmp_path / "q" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "q"


def test_from_end_to_end(questions, tmp_path, monkeypatch, capsys):
    out, table = tmp_path / "out", tmp_path / "all.csv"
    args = ["--model", EXAMPLE / "checkpoint", "--questions", questions, "--out", out, "--csv", table]
    args += ["--budgets", 0.83, "--only", "lattice", "smaller", "oracle", "VScan, keep", "--device", "cpu"]
    args += ["--name", "tiny", "--limit", 1]
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, args)])
    assert study.main() == 0, capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"answers.jsonl", "settings.json", "rows.csv"}
    rows = load(table)
    assert rows == load(out / "rows.csv") and {r.model for r in rows} == {"tiny"}
    right = {r.method: r for r in rows if r.quantity == "right" and not r.family}
    assert [*right] == [UNPRUNED, "lattice", "smaller", "VScan, keep", "oracle"]
    assert {r.n for r in right.values()} == {2}  # one of each family
    cuts = {r.method: r.mean for r in rows if r.quantity == "cut"}
    assert cuts.pop(UNPRUNED) == 0 and all(0.8 < cut < 0.9 for cut in cuts.values())
    asked = (out / "answers.jsonl").read_bytes()
    assert study.main() == 0
    assert (out / "answers.jsonl").read_bytes() == asked  # nothing was asked again


def test_two_full_passes_keep_what_scout_keeps_and_cost_more(questions, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    args = ["--model", EXAMPLE / "checkpoint", "--questions", questions, "--out", out, "--device", "cpu"]
    args += ["--dtype", "float32", "--budgets", 0.83, "--only", "Scout, diverse", passes.TWO_PASSES[:24]]
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, args), "--batch-size", "3"])
    assert study.main() == 0, capsys.readouterr().err
    told = {}
    for line in (out / "answers.jsonl").read_text().splitlines():
        answer = json.loads(line)
        told.setdefault(answer["policy"], {})[answer["question"]] = answer
    (key,) = [key for key in told if key.startswith("two full passes of Scout(")]
    scout, again = told[key.removeprefix("two full passes of ")], told[key]
    assert {i: a["kept"][-1][1] for i, a in again.items()} == {i: a["kept"][-1][1] for i, a in scout.items()}
    assert len({a["kept"][-1][1] for a in again.values()}) > 1  # each question has its own
    cuts = {r.method: r.mean for r in load(out / "rows.csv") if r.quantity == "cut"}
    assert 0.7 < cuts[passes.TWO_PASSES] < cuts["Scout, diverse"]
    timed = {r.method for r in load(out / "rows.csv") if r.quantity == "prefill seconds"}
    assert "Scout, diverse" in timed and passes.TWO_PASSES not in timed


def test_bad_input_is_one_line(questions, tmp_path, monkeypatch, capsys):
    args = ["--model", EXAMPLE / "checkpoint", "--questions", questions, "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, [*args, "--only", "nobody"])])
    assert study.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: only: expected beginnings of") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_picture_of_scout_at_work(tmp_path, monkeypatch, capsys):
    image, out = EXAMPLE / "images" / "scene_1.png", tmp_path / "scout.png"
    image = image if image.exists() else next((EXAMPLE / "images").glob("*.png"))
    policy = "scout:coarse=(uniform:layer=0,keep=24),fine=10,look=5"
    checkpoint = Checkpoint(str(EXAMPLE / "checkpoint"), "cpu", "float32")
    scene = pictures.look_at(checkpoint, image, "where is the red star ?", policy)
    assert scene.coarse.shape == (14, 14) and scene.coarse.sum() == 24 and scene.fine.sum() == 10
    assert not (scene.coarse & scene.fine).any() and scene.scores.max() == 1
    best = np.zeros(14 * 14, dtype=bool)
    best[scene.scores.flatten().argsort()[-10:]] = True
    assert not scene.fine.flatten()[best].all()  # they are also unlike one another
    alone = pictures.look_at(checkpoint, image, "where is the red star ?", policy + ",by=attention")
    assert (alone.scores == scene.scores).all()  # where the last row looks does not depend on who is chosen
    assert (alone.fine.flatten() == best).all()
    args = [
        "--model",
        EXAMPLE / "checkpoint",
        "--image",
        image,
        "--prompt",
        "where is the red star ?",
        "--out",
        out,
    ]
    monkeypatch.setattr("sys.argv", ["pictures.py", *map(str, args), "--policy", policy])
    assert pictures.main() == 0 and capsys.readouterr().out.strip() == scene.answer
    assert out.read_bytes()[:4] == b"\x89PNG"
    for other in ("fastv", "scout:by=random"):
        monkeypatch.setattr("sys.argv", ["pictures.py", *map(str, args), "--policy", other])
        assert pictures.main() == 2
        assert f"error: policy: expected a scout that looks, got '{other}'" in capsys.readouterr().err

"""An evaluation from Python: what the command does, with a model of one's own, telling how far it is."""

import json
import shutil
from pathlib import Path

import pytest

from vlmprune import ops
from vlmprune.errors import ModelError
from vlmprune.eval import Checkpoint, read_questions, run
from vlmprune.eval.ask import text_lengths, with_template
from vlmprune.flops import decoder_flops
from vlmprune.models.host.parts import decoder_shape
from vlmprune.policies import FastV

pytest.importorskip("matplotlib")
EXAMPLE = Path(__file__).parents[2] / "examples" / "glyphworld"


@pytest.fixture
def checkpoint():
    return Checkpoint(str(EXAMPLE / "checkpoint"), device="cpu", dtype="float32")


@pytest.fixture
def questions(tmp_path):
    """Two questions about one scene."""
    entry = json.loads((EXAMPLE / "images" / "questions.json").read_text())[0]
    (tmp_path / "q").mkdir()
    shutil.copy(EXAMPLE / "images" / entry["image"], tmp_path / "q")
    asked = [x for x in entry["qa"] if x["family"] in ("color", "exist")]
    lines = [{"id": x["family"], "image": entry["image"]} | x for x in asked]
    (tmp_path / "q" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "q"


def test_a_loaded_model_is_asked_and_progress_is_told(checkpoint, questions, tmp_path, capfd, monkeypatch):
    for name in ("draw_pareto", "draw_families", "draw_heat"):
        monkeypatch.setattr(f"vlmprune.eval.evaluation.{name}", lambda results: b"png")
    mine = Checkpoint.of(checkpoint.model, checkpoint.processor)
    assert (mine.source, mine.device, mine.dtype) == (checkpoint.source, "cpu", "float32")
    capfd.readouterr()
    told, policy, out = [], FastV(layer=2, keep=0.5), tmp_path / "out"
    with ops.use_backend("reference"):
        found = run(
            mine,
            str(questions),
            str(out),
            [policy, "uniform:layer=2,keep=98"],
            budgets=(),
            baselines=False,
            progress=lambda *step: told.append(step),
        )
    assert [result.method for result in found.results] == ["unpruned", str(policy), "uniform:layer=2,keep=98"]
    assert found.results[1].policy == repr(policy) and found.results[1].all.questions == 2
    ids = {question.id for question in read_questions(questions)}
    assert len(found.answers) == 6 and {key[1] for key in found.answers} == ids
    answers = [("answers", done, 6) for done in range(7)]
    assert told == [(f"loading {mine.source}", 0, 0), *answers, ("drawing", 0, 0)]
    assert found.page == out / "report.html" and found.page.is_file() and found.speed > 0
    assert found.settings["attention"] == "sdpa" and found.settings["visual_tokens"] == 196
    assert capfd.readouterr() == ("", "")


def test_pictures_that_cannot_be_made_so_small_are_left_out_with_the_reason(
    checkpoint, questions, tmp_path, monkeypatch
):
    """By default; an error, before the weights are loaded, where they were asked for by name."""
    for name in ("draw_pareto", "draw_families", "draw_heat"):
        monkeypatch.setattr(f"vlmprune.eval.evaluation.{name}", lambda results: b"png")
    monkeypatch.setattr("vlmprune.smaller.ONE_SIZE", ())
    with monkeypatch.context() as unloaded, pytest.raises(ModelError, match=r"^smaller: expected a model of"):
        unloaded.setattr("vlmprune.checkpoints.AutoModelForImageTextToText", None)
        run(checkpoint, questions, tmp_path / "none", budgets=(0.5,), baselines=("smaller",))
    with ops.use_backend("reference"):
        found = run(checkpoint, questions, tmp_path / "out", budgets=(0.5,), seeds=1)
    assert [result.method.partition(":")[0] for result in found.results] == [
        "unpruned",
        "uniform",
        "uniform",
        "random",
    ]
    assert found.settings["left_out"].startswith("smaller at 50.0%: smaller: expected a model of type")
    assert "smaller at 50.0%" in found.page.read_text()


def test_the_smaller_pictures_answers_cost_what_ran(checkpoint, questions, tmp_path, monkeypatch):
    for name in ("draw_pareto", "draw_families", "draw_heat"):
        monkeypatch.setattr(f"vlmprune.eval.evaluation.{name}", lambda results: b"png")
    found = run(checkpoint, questions, tmp_path / "out", budgets=(0.6,), baselines=("smaller",))
    (small,) = (result for result in found.results if result.method == "smaller")
    shape = decoder_shape(checkpoint.config)
    lengths = text_lengths(checkpoint.processor, with_template(checkpoint, read_questions(questions)))
    cuts = [
        1
        - decoder_flops(shape, [small.tokens + text] * shape.layers)
        / decoder_flops(shape, [196 + text] * shape.layers)
        for text in lengths
    ]
    assert small.tokens == 64 and small.seeds == 1  # 8 x 8 of at most 80
    assert small.cut == pytest.approx(sum(cuts) / len(cuts), abs=1e-6) and small.cut >= 0.6


@pytest.mark.parametrize(
    "options, said",
    [
        ({"budgets": (0.5, 1.5)}, r"^budgets: expected FLOPs cuts between 0 and 1, got 0.5,1.5$"),
        ({"seeds": 0}, r"^seeds: expected at least 1, got 0$"),
        ({"baselines": ("uniform",)}, r"^baselines: expected some of lattice, raster, random, smaller"),
        ({"batch_size": 0}, r"^batch_size: expected at least 1, got 0$"),
        ({"policies": ["fastv:layer=8"]}, r"^layer: expected at most 7"),
    ],
)
def test_bad_input_is_said_before_the_weights_are_loaded(
    checkpoint, questions, tmp_path, monkeypatch, options, said
):
    monkeypatch.setattr("vlmprune.checkpoints.AutoModelForImageTextToText", None)
    with pytest.raises(ValueError, match=said):
        run(checkpoint, questions, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_is_none():
    with pytest.raises(ValueError, match=r"^dtype: expected one of auto, float32, .*, got 'half'$"):
        Checkpoint("anywhere", dtype="half")

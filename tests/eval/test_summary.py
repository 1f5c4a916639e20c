"""Rows: pooled over seeds, compared question by question, and the map of kept patches."""

from pathlib import Path

import numpy as np
import pytest

from vlmprune.eval.arms import UNPRUNED, Arm
from vlmprune.eval.intervals import bootstrap
from vlmprune.eval.page import make_page
from vlmprune.eval.questions import Question
from vlmprune.eval.store import Answer
from vlmprune.eval.summary import kept_share, summarize
from vlmprune.policies import FastV, Random, Uniform

QUESTIONS = [Question(str(i), Path("a.png"), "box" if i < 4 else "<color>", "?", "!") for i in range(6)]
ARMS = [
    Arm(UNPRUNED),
    Arm("fastv", 0.5, FastV(keep=0.4)),
    Arm("uniform", 0.5, Uniform(keep=0.4)),
    Arm("uniform", 0.9, Uniform(keep=0.1)),
    *(Arm("random", 0.5, Random(keep=0.4), seed) for seed in (0, 1)),
]
RIGHT = {"unpruned": "111110", "fastv": "100110", "uniform": "110000", "random": ("111000", "101000")}
CUTS = {None: 0.0, 0.5: 0.51, 0.9: 0.9}


@pytest.fixture
def rows():
    answers = {}
    for arm in ARMS:
        marks = RIGHT[arm.method][arm.seed] if arm.method == "random" else RIGHT[arm.method]
        for question, mark in zip(QUESTIONS, marks, strict=True):
            key, number = (arm.key, question.id, arm.seed), int(question.id)
            answers[key] = Answer(*key, "", mark == "1", False, CUTS[arm.budget], 9.0, number / 10, ())
    return summarize(QUESTIONS, ARMS, answers)


def test_rows_in_the_order_of_the_arms(rows):
    assert [(r.method, r.budget, r.seeds) for r in rows] == [
        ("unpruned", None, 1),
        ("fastv", 0.5, 1),
        ("uniform", 0.5, 1),
        ("uniform", 0.9, 1),
        ("random", 0.5, 2),
    ]
    assert [r.cut for r in rows] == pytest.approx([0, 0.51, 0.51, 0.9, 0.51])
    assert {r.prefill for r in rows} == {0.25}


def test_accuracy_and_paired_differences(rows):
    unpruned, fastv, uniform, far, random = rows
    assert unpruned.all.right.mean == pytest.approx(5 / 6)
    assert unpruned.all.to_unpruned is None and unpruned.all.to_uniform is None  # too far in FLOPs
    assert fastv.all.to_unpruned == bootstrap([0, -1, -1, 0, 0, 0])
    assert fastv.all.to_uniform == bootstrap([0, -1, 0, 1, 1, 0])
    assert uniform.all.to_uniform is None and far.all.to_uniform is None
    assert random.all.right.mean == pytest.approx((1 + 0.5 + 1) / 6)
    assert random.all.to_uniform == bootstrap([0, -0.5, 1, 0, 0, 0])
    assert fastv.families["box"].right.mean == 0.5 and fastv.families["box"].questions == 4
    assert fastv.families["box"].to_unpruned == bootstrap([0, -1, -1, 0])


def test_as_dict_is_plain(rows):
    out = rows[1].as_dict()
    assert out["all"]["right"].keys() == {"mean", "low", "high"}
    assert list(out["families"]) == ["<color>", "box"]
    assert out["budget"] == 0.5 and out["all"]["questions"] == 6


def test_where_tokens_were_kept():
    """Token i is bit i, raster order."""
    made = [
        Answer("p", str(i), 0, "", True, True, 0, 0, 0, kept)
        for i, kept in enumerate([((2, "21"),), ((2, "1"),)])
    ]
    (share,) = kept_share(made, (2, 3)).values()
    assert np.array_equal(share, [[1.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
    both = [Answer("p", "1", 0, "", True, True, 0, 0, 0, ((5, "1"), (2, "3f")))]
    assert {layer: grid.sum() for layer, grid in kept_share(both, (2, 3)).items()} == {2: 6.0, 5: 1.0}


def test_the_page_stands_alone(rows):
    page = make_page({"model": "<m>"}, rows, {"Accuracy & cost": b"png"})
    assert "<script" not in page and "http" not in page
    assert "&lt;m&gt;" in page and "&lt;color&gt;" in page and "Accuracy &amp; cost" in page
    assert "data:image/png;base64,cG5n" in page
    assert "50.0 [" in page

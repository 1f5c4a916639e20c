"""What studies share: scaled layers by hand, rows that replace no others, faults that stay faults."""

import pytest
from common.asking import exit_code, first
from common.methods import TOWER, placed, scaled, that_fit
from common.rows import load, row, save
from common.tables import gain, markdown

from vlmprune import DivPrune, FastV
from vlmprune.errors import InputError
from vlmprune.eval import Estimate, Question


def test_layers_are_the_nearest_and_at_least_1():
    assert [scaled(layer, 32) for layer in (3, 8, 24)] == [3, 8, 24]
    assert [scaled(layer, 28) for layer in (4, 8, 16, 24)] == [4, 7, 14, 21]
    assert scaled(5, 24, TOWER) == 5 and scaled(5, 4, TOWER) == 1 and scaled(4, 2) == 1


def test_what_a_depth_has_no_room_for_is_said():
    texts = {"one": "fastv:layer=1", "late": "fastv:layer=2", "twice": "pyramiddrop:layers=1/1"}
    fit, left_out = that_fit(texts, 2)
    assert fit == {"one": FastV(layer=1)}
    assert left_out[0] == "late: layers: expected some in 0..1, got (2,)"
    assert left_out[1].startswith("twice: layers: expected") and len(left_out) == 2


def test_a_method_is_kept_and_packed_or_neither():
    assert placed(DivPrune()) == {"keep": DivPrune(positions="keep"), "pack": DivPrune(positions="pack")}
    assert placed(FastV()) == {}


def test_rows_of_other_arms_stay(tmp_path):
    def one(mean, model="a", method="x", budget=0.5, part="budget"):
        named = {"model": model, "part": part, "method": method, "quantity": "right", "budget": budget}
        return row(Estimate(mean, 0, 1), 4, **named)

    old = [one(0.1), one(0.1, budget=None), one(0.1, method="y"), one(0.1, part="kept"), one(0.1, model="b")]
    save(tmp_path / "t.csv", old, "float32")
    new = [one(0.2), one(0.2, budget=0.9)]
    save(tmp_path / "t.csv", new, "float32")
    assert load(tmp_path / "t.csv") == [*old[1:], *new]


def test_bad_input_is_a_line_and_a_fault_is_not_hidden(capsys):
    def bad():
        raise InputError("x: expected 1, got 2")

    def fault():
        raise ValueError("not ours")

    assert exit_code(bad) == 2 and capsys.readouterr().err == "error: x: expected 1, got 2\n"
    with pytest.raises(ValueError, match="not ours"):
        exit_code(fault)


def test_the_first_questions_of_each_family(tmp_path):
    questions = [Question(str(i), tmp_path, family, "?", "a") for i, family in enumerate("aabab")]
    assert [q.id for q in first(questions, 1)] == ["0", "2"] and first(questions, None) == questions


def test_tables_by_hand():
    assert gain(Estimate(0.1, 0.0, 0.2)) == "+10.0 [+0.0, +20.0]"
    assert gain(Estimate(-0.1, -0.2, -0.05)) == "**-10.0 [-20.0, -5.0]**"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"

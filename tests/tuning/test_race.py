"""Successive halving with planted answers: who goes on, what it costs, what is told; and how questions are split."""

from collections import Counter
from pathlib import Path

import pytest

from vlmprune.eval.arms import Arm
from vlmprune.eval.questions import Question
from vlmprune.eval.store import Answer, Store
from vlmprune.policies import FastV
from vlmprune.tuning import race as module
from vlmprune.tuning.race import race, split
from vlmprune.tuning.schedules import GSearch, PSigmoid
from vlmprune.tuning.search import _parts

ASKED = [Question(f"q{i}", Path("x.png"), "abc"[i % 3 > 0], "?", "!") for i in range(100)]
ARMS = [Arm(f"fastv:layer={k}", 0.5, FastV(layer=k)) for k in range(1, 8)]


@pytest.fixture
def planted(monkeypatch):
    """Layer k is right in the first 10 k of every 100 questions by number, and saves a half, or what ``cuts`` says."""
    cuts, calls = {}, []

    def ask_all(subject, questions, arms, store):
        for arm in arms:
            for question in questions:
                if (arm.key, question.id, arm.seed) in store.answers:
                    continue
                right = arm.policy is None or int(question.id[1:]) * 7 % 100 < 10 * arm.policy.layer
                saved = cuts.get(arm.method, 0.5)
                answer = Answer(arm.key, question.id, arm.seed, "", right, right, saved, 1.0, 0.0, ())
                store.add(answer)
                calls.append(answer)
                yield answer

    monkeypatch.setattr(module, "ask_all", ask_all)
    return cuts, calls


def run(folder, arms=ARMS, one_in=2, left_out=None):
    store, told = Store(folder, {}), []
    parts = split(ASKED, 16, 0)
    out = {} if left_out is None else left_out
    rungs = list(race(None, arms, parts, one_in, store, out, lambda *step: told.append(step)))
    return rungs, told


@pytest.mark.parametrize("one_in, sizes", [(2, [7, 4, 2, 2]), (3, [7, 3, 2, 2])])
def test_the_best_wins_and_the_better_part_goes_on(planted, tmp_path, one_in, sizes):
    rungs, told = run(tmp_path, one_in=one_in)
    assert [len(rung.standings) for rung in rungs] == sizes
    assert [rung.questions for rung in rungs] == [16, 32, 64, 100]
    for rung, after in zip(rungs, [*rungs[1:], None], strict=True):
        rights = [one.right.mean for one in rung.standings]
        assert rights == sorted(rights, reverse=True)
        staying = [one.method for one in rung.standings if one.stays]
        assert staying == [one.method for one in rung.standings][: len(staying)]
        assert len(staying) == (1 if after is None else len(after.standings))
        assert after is None or {one.method for one in after.standings} == set(staying)
        assert rung.unpruned.mean == 1.0
        for one in rung.standings:
            assert one.to_best.mean == pytest.approx(one.right.mean - rights[0])
            assert one.to_best.low <= one.to_best.mean <= one.to_best.high <= 0
    best, second = rungs[-1].standings
    assert (best.method, best.right.mean) == ("fastv:layer=7", 0.7)
    assert (second.method, second.right.mean, second.to_best.mean) == (
        "fastv:layer=6",
        0.6,
        pytest.approx(-0.1),
    )
    steps = [16, 16, 32, 36]
    assert len(planted[1]) == sum((n + 1) * asked for n, asked in zip(sizes, steps, strict=True))
    assert told[0] == ("rung 1 of 4", 0, 8 * 16) and told[-1][0] == "rung 4 of 4"


def test_a_killed_race_goes_on_with_what_it_has(planted, tmp_path):
    whole, _ = run(tmp_path)
    asked = len(planted[1])
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    left = path.read_bytes().count(b"\n")
    again, _ = run(tmp_path)
    assert again == whole and len(planted[1]) == 2 * asked - left


def test_what_costs_more_than_the_budget_is_left_out(planted, tmp_path):
    planted[0]["fastv:layer=7"] = 0.45
    left_out = {}
    rungs, _ = run(tmp_path, left_out=left_out)
    assert left_out == {"fastv:layer=7": "budget: expected a cut of 50.0%, got 45.0% when it ran"}
    assert rungs[-1].standings[0].method == "fastv:layer=6" and len(rungs[0].standings) == 6
    with pytest.raises(
        ValueError, match=r"^policy: expected one that saves the budget when it runs, got budget:"
    ):
        run(tmp_path, ARMS[-1:])


@pytest.mark.parametrize("first", [7, 16, 40, 90, 100, 500])
def test_parts_double_and_hold_every_family(first):
    parts = split(ASKED, first, 3)
    asked = [question for part in parts for question in part]
    assert Counter(asked) == Counter(ASKED) and parts == split(ASKED, first, 3) != split(ASKED, first, 4)
    ends = [sum(map(len, parts[: i + 1])) for i in range(len(parts))]
    assert ends[:-1] == [first * 2**i for i in range(len(parts) - 1)]
    assert len(parts[-1]) >= min(first, 100)
    for part in parts:
        assert Counter(q.family for q in part)["a"] == pytest.approx(len(part) * 0.34, abs=2)


def test_what_is_fitted_to_answers_is_not_raced_on_them():
    searched, curve = GSearch(FastV(layer=1)), PSigmoid(FastV(layer=1))
    own, parts = _parts(ASKED, 16, 3, {"g": searched, "p": curve})
    assert own == split(ASKED, 16, 3)[0] and [*map(len, parts)] == [16, 16, 32, 20]
    assert Counter([*own, *(question for part in parts for question in part)]) == Counter(ASKED)
    assert _parts(ASKED, 16, 3, {"p": curve}) == ([], split(ASKED, 16, 3))
    with pytest.raises(ValueError, match=r"^questions: expected at least 102 with g_search, which has 51 to"):
        _parts(ASKED, 51, 3, {"g": searched})

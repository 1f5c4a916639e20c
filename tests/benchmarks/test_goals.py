"""The goals: met, missed or unmeasured, by the bandwidth of the card; and which backend should be the default."""

import pytest
import tile_sweep
from gpu_day import goals
from micro.shapes import SHAPES


def goal_row(case, shape, provider, median, **changes):
    row = dict(case=case, shape=shape, provider=provider, median_us=str(median), dtype="bf16", rows="1")
    return row | dict(mode="graph", note="", copy_gb_per_s="4100") | changes


def test_goals_are_met_missed_or_unmeasured():
    first, second = list(goals.FIGURES)[:2]
    rows = [
        goal_row("prune_tokens", first, "triton", 30),
        goal_row("prune_tokens", first, "plan", 20),  # the fastest of ours counts: 1.25 * 16
        goal_row("prune_tokens", first, "torch", 99.9),
        goal_row("prune_tokens", first, "plan", 1, mode="call"),
        goal_row("prune_tokens", first, "plan", 1, dtype="fp32"),
        goal_row("prune_tokens", first, "plan", 1, rows="64"),
        goal_row("prune_tokens", second, "triton", 32.6),
        goal_row("prune_tokens", second, "torch", 163),
        goal_row("prune_tokens", second, "eager", "", mode="", note="out of memory"),
        goal_row("received_attention", first, "triton", 5),
        goal_row("received_attention", first, "flash-colreduce", 5),
        goal_row("greedy_select maxmin", second, "triton", 5, rows="0"),
        goal_row("greedy_select maxmin", second, "published loop", 100, rows="0"),
    ]
    lines = list(goals.verdicts(goals.Results(rows)))
    calls = list(goals.comparisons(goals.Results(rows, "call")))
    assert [line for line in calls if not line.startswith("unmeasured")] == []
    assert len(lines) == 5 + 5 + 5 + 4 + 5 + 1
    verdict = {line.split("  ", 1)[1].strip().partition(":")[0]: line.split()[0] for line in lines}
    expected = {
        f"prune_tokens at most 20 us, {first}": "met",
        f"prune_tokens at most 32.5 us, {second}": "missed",
        f"prune_tokens 5 times as fast as torch, {first}": "missed",
        f"prune_tokens 5 times as fast as torch, {second}": "met",
        f"prune_tokens 20 times as fast as eager, {second}": "unmeasured",
        f"received_attention 1 times as fast as flash-colreduce, {first}": "missed",  # it is to be faster
        f"greedy_select maxmin 20 times as fast as published loop, {second}": "met",
    }
    assert {goal: verdict[goal] for goal in expected} == expected
    assert any(line.endswith(f"eager, {second}: out of memory") for line in lines)
    assert sum(word == "unmeasured" for word in verdict.values()) == len(lines) - 6


def test_goals_name_cases_shapes_and_providers_that_exist():
    shapes = [shape.name for shape in SHAPES]
    assert list(goals.FIGURES) == shapes
    for goal in goals.VERSUS:
        (case,) = [case for case in tile_sweep.CASES if case.name == goal.case]
        assert {goal.provider, "triton"} <= {provider.name for provider in case.providers()}
        assert set(goal.shapes) <= set(shapes)
    assert [s.name for s in SHAPES if s.length >= 2944] == list(goals.LONG)


def test_limits_follow_the_bandwidth_of_the_card():
    """Half the bandwidth, twice the time for the bytes, and the same for the rest."""
    for shape, figure in goals.FIGURES.items():
        assert 0 < goals.BYTES[shape] < figure
        assert goals.limit_us(shape) == pytest.approx(goals.SLACK * figure)
        assert goals.limit_us(shape, goals.COPY / 2) == pytest.approx(
            goals.SLACK * (figure + goals.BYTES[shape])
        )
    shape, limit = "qwen2.5-vl-7b-32k", goals.limit_us("qwen2.5-vl-7b-32k", 3000)
    (verdict,) = [
        line
        for line in goals.verdicts(
            goals.Results([goal_row("prune_tokens", shape, "plan", limit, copy_gb_per_s="3000")])
        )
        if line.startswith("met")
    ]
    assert f"at most {limit:.4g} us" in verdict and verdict.endswith("copy 3000 GB/s")


def test_a_default_is_the_backend_that_is_faster_in_the_mean():
    first, second = list(goals.FIGURES)[:2]
    rows = [
        goal_row("gather_tokens", first, "triton", 10, rows="0"),
        goal_row("gather_tokens", first, "cuda", 5, rows="0"),
        goal_row("gather_tokens", second, "triton", 10, rows="0"),
        goal_row("gather_tokens", second, "cuda", 11, rows="0"),
        goal_row("select_topk", first, "triton", 10, rows="0", dtype="fp32"),
        goal_row("select_topk", first, "cuda", 11, rows="0", dtype="fp32"),
        goal_row("compact_kv", first, "cuda", 11, rows="0"),
        goal_row("row_lse", first, "triton", 1, dtype="fp32"),
        goal_row("row_lse", first, "cuda", 1, dtype="fp32"),
    ]
    gather, select = goals.defaults(goals.Results(rows))
    assert gather.startswith("gather_tokens: default should be cuda (cuda takes 0.74 of triton's time")
    assert gather.endswith("is faster at 1 of 2 shapes)")
    assert select.startswith("select_topk: default should be triton (cuda takes 1.10")

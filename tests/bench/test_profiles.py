"""A trace is read back: every arm, every range of ours in it, and times that add up; without a profiler there are no ranges."""

import gzip
import json

import pytest
from torch.autograd import profiler

from helpers.tiny import make_batch, make_model
from vlmprune import FastV, Feather, ops, prune
from vlmprune.bench import FullSize, by_range, profiles, read_profile
from vlmprune.bench.arms import Arm
from vlmprune.bench.prompts import Prompt
from vlmprune.errors import InputError
from vlmprune.models.ranges import begin, end


@pytest.fixture(autouse=True)
def reference():
    with ops.use_backend("reference"):
        yield


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_is_read_back(tmp_path, name):
    model, path = FullSize("tiny", device="cpu").model, tmp_path / name
    arms = [
        Arm("unpruned", "plain", Prompt()),
        Arm("unpruned", "graphs", Prompt(), reason="no GPU"),
        Arm("feather", "plain", Prompt(), Feather(layers=(2, 4), keep=0.3)),
    ]
    profiles.write_profile(path, model, arms, warm_up=1)
    rows = read_profile(path)
    ranges = by_range(rows)
    assert [*ranges] == ["unpruned", "feather"]
    assert ranges["unpruned"].keys() == {"vision", "prefill", "decode", "other"}
    selections = {"selection, layer 2", "selection, layer 4"}
    assert ranges["feather"].keys() == ranges["unpruned"].keys() | selections

    # six layers of seven products, in one prefill and in each decode step; the head lies in none
    for arm in ranges:
        calls = {row.range: row.calls for row in rows if row.arm == arm and row.operation == "aten::mm"}
        assert calls["prefill"] == 6 * 7 and calls["decode"] == profiles.STEPS * 6 * 7
    data = path.read_bytes()
    events = json.loads(gzip.decompress(data) if name.endswith("gz") else data)["traceEvents"]
    whole = {
        e["name"].removeprefix(profiles.ARM): e["dur"] / 1e6 for e in events if profiles.ARM in e["name"]
    }
    for arm, parts in ranges.items():
        assert 0 < sum(parts.values()) < whole[arm]
    mine = [row for row in rows if row.arm == "feather"]
    assert [row.seconds for row in mine] == sorted((row.seconds for row in mine), reverse=True)


def event(name, cat, ts, dur, tid=1):
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid}


def test_own_times_and_innermost_ranges(tmp_path):
    events = [
        event("vlmprune bench: a", "user_annotation", 0, 100),
        event("vlmprune: prefill", "user_annotation", 10, 50),
        event("vlmprune: selection, layer 2", "user_annotation", 20, 10),
        event("outer", "cpu_op", 10, 8),
        event("inner", "cpu_op", 11, 3),
        event("inner", "cpu_op", 15, 2),
        event("inner", "cpu_op", 22, 4),
        event("late", "cpu_op", 70, 5),
        event("before", "cpu_op", 200, 5),
        {"ph": "i", "name": "mark", "ts": 3},
    ]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": events}))
    found = {
        (r.range, r.operation): (round(1e6 * r.seconds), r.calls) for r in read_profile(tmp_path / "t.json")
    }
    assert found == {
        ("prefill", "outer"): (3, 1),
        ("prefill", "inner"): (5, 2),
        ("selection, layer 2", "inner"): (4, 1),
        ("other", "late"): (5, 1),
    }


def test_on_a_gpu_kernels_count(tmp_path):
    events = [
        event("vlmprune bench: a", "user_annotation", 0, 10),
        event("aten::mm", "cpu_op", 1, 2),
        event("vlmprune bench: a", "gpu_user_annotation", 5, 30),
        event("vlmprune: decode", "gpu_user_annotation", 8, 20),
        event("gemm", "kernel", 9, 7),
    ]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": events}))
    (row,) = read_profile(tmp_path / "t.json")
    assert (row.arm, row.range, row.operation, row.calls) == ("a", "decode", "gemm", 1)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"traces": []}'])
def test_no_trace(tmp_path, content):
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match="profile: expected a "):
        read_profile(tmp_path / "t.json")


def test_without_a_profiler_no_range_is_made(monkeypatch):
    assert begin("vision") is None
    monkeypatch.setattr(profiler, "record_function", None)
    with prune(make_model(), FastV(layer=2, keep=4)) as run:
        run._parts.model.generate(**make_batch([[3, "I", 5]]), max_new_tokens=3)


def test_ranges_end_before_the_profiler_does():
    with profiler.profile() as seen:
        end(begin("selection, layer %d", 7))
    assert [e.name for e in seen.function_events] == ["vlmprune: selection, layer 7"]

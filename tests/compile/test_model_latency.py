"""The latency model on the kernels as they are: every loop is known, and benchmarks/README.md shows what it says."""

import re
from pathlib import Path

import model_latency
import pytest
import triton

if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter cannot compile; run with TRITON_INTERPRET=0", allow_module_level=True)

ROOT = Path(__file__).parents[2]
COMMAND = "python -P benchmarks/model_latency.py --markdown"


@pytest.fixture(scope="module")
def lines():
    return model_latency.table([])


def test_times_grow_with_the_shape_and_stay_above_the_bytes(lines):
    by_card = {card: [x.prediction for x in lines if x.card == card] for card in model_latency.CARDS}
    for predictions in by_card.values():
        small, large, *video = predictions
        assert small.total < large.total
        assert [p.total for p in video] == sorted(p.total for p in video)
        for p in predictions:
            assert p.floor < p.low < p.total < p.high
            assert p.total == pytest.approx(sum(p.columns.values()))
            assert all(p.columns[name] > 0 for name in ("score", "select", "gather", "gaps"))
    for slow, fast in zip(by_card["H100"], by_card["H200"], strict=True):
        assert slow.total > fast.total and slow.floor > fast.floor


def test_what_was_measured_stands_beside_it():
    row = dict(
        case="prune_tokens", shape="llava-1.5-7b", provider="plan", dtype="bf16", rows="1", mode="graph"
    )
    row |= dict(median_us="21.5", note="", device="NVIDIA H200", copy_gb_per_s="4100")
    measured = {(x.shape, x.card): x.measured for x in model_latency.table([row]) if x.measured is not None}
    assert measured == {("llava-1.5-7b", "H200"): 21.5}


def test_the_readme_shows_the_table(lines):
    """Of the Triton of requirements/dev.txt: other compilers give other code."""
    pinned = re.search(r"^triton==([\d.]+)", (ROOT / "requirements" / "dev.txt").read_text(), re.MULTILINE)
    if triton.__version__ != pinned.group(1):
        pytest.skip(f"the table is of triton {pinned.group(1)}")
    text = (ROOT / "benchmarks" / "README.md").read_text()
    shown = re.search(rf"<!-- `{re.escape(COMMAND)}` -->\n(.*?)\n<!-- end -->", text, re.DOTALL).group(1)
    assert shown.splitlines() == list(model_latency.markdown(lines)), f"out of date: {COMMAND}"


@pytest.mark.parametrize("launch", [(), ("prune bf16 packed",)], ids=["shapes", "a launch of the tests"])
def test_loops_are_listed(launch, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["model_latency", "--loops", *launch])
    model_latency.main()
    out = capsys.readouterr().out
    assert "score_part: for h_kv in range(h_first, h_last)" in out
    assert ("gather (every)" in out) == (not launch)


def test_an_unknown_launch_is_named(monkeypatch):
    monkeypatch.setattr("sys.argv", ["model_latency", "--loops", "prune nothing"])
    with pytest.raises(SystemExit, match=r"--loops: expected one of score bf16 .*, got prune nothing"):
        model_latency.main()

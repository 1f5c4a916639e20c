"""The stages of the seven calls: what each runs, for how many seconds at most, and what makes it small in a dry run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from gpu_day.state import BENCH, LEARNED

BENCHMARKS = Path(__file__).parents[1]
PROBES = str(BENCHMARKS / "gpu_day" / "probes.py")
QUICK = ("cuda", "triton", "plan", "torch", "scores + topk", "eager", "flash-colreduce", "published loop")
FIRST_COMPILED = ("llava-1.5-7b", "qwen2.5-vl-7b-4k")  # torch.compile takes seconds a shape
OTHERS_COMPILED = ("llava-next-7b", "qwen2.5-vl-7b-16k", "qwen2.5-vl-7b-32k")
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")


PREPARES = 0


class Stage(NamedTuple):
    """One program.

    Attributes:
        call: which of the seven calls it belongs to; PREPARES = to each, and on another machine it is done again.
        name: what it is asked for by.
        seconds: how long it may take.
        line: arguments of Python.
        dry: further ones, in a dry run; of an option given twice the last counts.
        tool: what starts Python; not in a dry run, if it is not there.
        journal: name of the file that tells a process started again what was begun; "" = the program keeps none.
    """

    call: int
    name: str
    seconds: int
    line: tuple[str, ...]
    dry: tuple[str, ...] = ()
    tool: tuple[str, ...] = ()
    journal: str = ""

    def command(self, python: str, journals: Path, dry: bool) -> list[str] | None:
        """The command line; None if its tool is not there."""
        line = [python, *self.line, *(self.dry if dry else ())]
        if self.journal:
            line += ["--journal", str(journals / self.journal)]
        if not self.tool:
            return line
        path = shutil.which(self.tool[0]) or shutil.which(f"/usr/local/cuda/bin/{self.tool[0]}")
        if path is not None:
            return [path, *self.tool[1:], *line]
        return line if dry else None


def _micro(rows: Path, cases: tuple[str, ...], modes: tuple[str, ...], *more: str) -> tuple[str, ...]:
    script = str(BENCHMARKS / "microbench.py")
    line = ("--no-plots", "--csv", str(rows), "--rows", "1", "--seconds", "0.1", "--modes", *modes)
    return script, *line, "--cases", *cases, *more


def _tests(*paths: str) -> tuple[str, ...]:
    """A test file that cannot be imported does not keep the others from running."""
    options = ("-q", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    return "-m", "pytest", *options, "-n", "16", "-m", "not slow", "--device", "cuda", *paths


def _bench(state: Path, shape: str, *more: str, name: str = "") -> tuple[str, ...]:
    """What ``vlmprune bench`` is asked; its results go to a folder of the shape's name."""
    out = ("--out", str(state / BENCH / (name or shape)))
    return "-m", "vlmprune.cli", "bench", "--shape", shape, *out, *more


def _learned(state: Path, what: str, name: str, *more: str) -> tuple[str, ...]:
    """Training, or the questions behind it, of the model ``name``."""
    folders = ("--run", str(state / "runs" / name), "--kept", str(state / LEARNED / name))
    return str(BENCHMARKS / "gpu_day" / "learned.py"), what, *folders, *more


def stages(state: Path, kit: Path) -> list[Stage]:
    """All, the most important first; results go to ``state``, and what was made beforehand lies in ``kit``."""
    rows, tiny, both = state / "rows.csv", ("--tiny",), ("graph", "call")
    small = ("--shapes", "tiny", "--seconds", "0.01", "--modes", "call")
    collect = ("--collect-only", "-q", "-n", "0", "--device", "cpu", "--ignore-glob", "*/test_[b-z]*.py")
    goals = ("prune_tokens", "received_attention", "greedy_select maxmin")
    moves = ("select_topk", "select_segments", "gather_tokens", "compact_kv")
    sets = ("prune_scored", "row_lse", "greedy_select", "merge_tokens", "cluster_dpc", "match_bipartite")
    environment = (PROBES, "environment", "--scratch", str(state / "environment"))
    kernels = ("cuda", "triton")
    sweep = (str(BENCHMARKS / "tile_sweep.py"),)
    sections = [word for section in SECTIONS for word in ("--section", section)]
    # without the caching allocator, or an access beyond a tensor stays inside PyTorch's pool
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")

    def calls(*more: str) -> tuple[str, ...]:
        return (PROBES, "calls", "--no-memory-pool", *more)

    def compiled(shapes: tuple[str, ...]) -> tuple[str, ...]:
        return _micro(rows, goals[:1], both, "--shapes", *shapes, "--providers", "torch.compile")

    quick = ("--rounds", "3", "--no-baselines")
    batches = ("--batch", "1,16", "--rounds", "3")
    small_model = ("--shape", "tiny", "--rounds", "1", "--new-tokens", "2", "--batch", "1")
    on_cpu = (*tiny, "--device", "cpu")
    smollm2 = ("--decoder", "smollm2", "--minutes", "4")
    not_compiled = (*small, "--providers", "torch")
    return [
        Stage(PREPARES, "build", 120, (PROBES, "build", "--kit", str(kit)), tiny),
        Stage(1, "info", 20, (PROBES, "info"), tiny),
        Stage(1, "check", 55, (PROBES, "check"), tiny, journal="check"),
        Stage(1, "goals", 80, _micro(rows, goals, both, "--providers", *QUICK), small, journal="goals"),
        Stage(1, "compiled", 45, compiled(FIRST_COMPILED), not_compiled, journal="compiled"),
        Stage(1, "host", 15, (PROBES, "host"), tiny),
        Stage(1, "replays", 40, (PROBES, "replays"), tiny, journal="replays"),
        Stage(1, "flash", 40, _tests("tests/models/test_flash.py"), collect),
        Stage(1, "prefill", 75, _bench(state, "llava-1.5-7b", *quick, name="quick"), small_model),
        Stage(1, "memcheck", 60, calls(), tiny, (*sanitizer, "memcheck")),
        Stage(2, "test_ops", 130, _tests("tests/ops", "tests/csrc"), collect),
        Stage(2, "test_policies", 60, _tests("tests/policies"), collect),
        Stage(2, "test_models", 140, _tests("tests/models"), collect),
        Stage(
            2,
            "backends",
            80,
            _micro(rows, moves, both[:1], "--providers", *kernels, "torch"),
            small,
            journal="backends",
        ),
        Stage(
            *(2, "counters", 45, (PROBES, "profiled"), tiny),
            tool=("ncu", "--clock-control", "none", "--profile-from-start", "off", *sections),
        ),
        Stage(
            2,
            "sweep",
            80,
            (*sweep, "--budget", "70", "--rows", "1"),
            ("--check", "--budget", "1"),
            journal="sweep",
        ),
        Stage(3, "dependent", 90, (*environment, "VLMPRUNE_PDL", "0", "1"), tiny),
        Stage(3, "variants", 230, (*sweep, "--budget", "220"), ("--check", "--budget", "1"), journal="sweep"),
        Stage(3, "compiled_others", 60, compiled(OTHERS_COMPILED), not_compiled, journal="compiled"),
        Stage(
            3,
            "sets",
            60,
            _micro(rows, sets, both[:1], "--providers", *kernels, "plan", "torch"),
            small,
            journal="sets",
        ),
        Stage(3, "check_float32", 60, (PROBES, "check", "--dtype", "fp32"), tiny, journal="check_float32"),
        Stage(3, "end_to_end", 40, (str(BENCHMARKS / "end_to_end.py"),), ("--repeat", "1")),
        Stage(
            *(4, "test_graphs", 35),
            _tests("tests/models/test_graphs.py", "tests/models/test_graph_store.py"),
            collect,
        ),
        Stage(4, "bench_llava", 150, _bench(state, "llava-1.5-7b", *batches), small_model),
        Stage(4, "bench_next", 110, _bench(state, "llava-next-7b", "--rounds", "3"), small_model),
        Stage(4, "bench_qwen2_5", 80, _bench(state, "qwen2.5-vl-7b-16k", "--rounds", "3"), small_model),
        Stage(4, "bench_qwen3", 70, _bench(state, "qwen3-vl-4b", "--rounds", "3"), small_model),
        Stage(4, "bench_13b", 90, _bench(state, "llava-1.5-13b", *quick), small_model),
        Stage(4, "speed_goals", 5, (str(BENCHMARKS / "gpu_day" / "speed_goals.py"), str(state / BENCH))),
        Stage(5, "train", 490, _learned(state, "train", "glyphworld"), on_cpu),
        Stage(
            *(5, "racecheck", 45, calls("--backends", "cuda"), tiny),
            tool=(*sanitizer, "racecheck"),  # of Triton's kernels the compiler places the barriers
        ),
        Stage(6, "ask", 480, _learned(state, "ask", "glyphworld"), tiny),
        Stage(6, "initcheck", 45, calls(), tiny, (*sanitizer, "initcheck")),
        Stage(7, "train_smollm2", 330, _learned(state, "train", "smollm2", *smollm2), on_cpu),
        Stage(7, "ask_smollm2", 200, _learned(state, "ask", "smollm2", "--budgets", "0.83"), tiny),
    ]

"""Measures a server without pruning and one with, never both at once: A B A B, the same requests to each.

    python examples/serving/compare.py --policy divprune:keep=64,positions=pack --json results.json -- --block-size 32

What follows ``--`` is given to both servers. The table has each number's median over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from load import add_plan, plan_of
from streams import measured

HERE = Path(__file__).parent
START = 300.0  # seconds that a server may take: the first one compiles


def main() -> None:
    """Measure, print, write the file; it is complete after every round."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="divprune:keep=64,positions=pack")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--log", type=Path, default=Path("build/serving/server.log"))
    parser.add_argument("vllm", nargs="*", help="options of both servers, behind --")
    add_plan(parser)
    args = parser.parse_args()
    plan, arms = plan_of(args), ("none", args.policy)
    url = f"http://127.0.0.1:{args.port}"
    runs: list[dict[str, Any]] = []
    for round in range(args.rounds):
        for policy in arms:
            with served(policy, args.port, args.vllm, args.log) as version:
                levels = asyncio.run(measured(url, plan))
            runs.append({"round": round, "policy": policy, "levels": [asdict(level) for level in levels]})
        about = {"machine": machine(), "vllm": version, "options": args.vllm, "plan": asdict(plan)}
        args.json.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    Console(width=120).print(table(runs, *arms))


@contextmanager
def served(policy: str, port: int, options: Sequence[str], log: Path) -> Iterator[str]:
    """A server, up and ready; yields vLLM's version. Raises SystemExit where it does not start."""
    words = [sys.executable, "-P", str(HERE / "serve.py"), "--policy", policy, "--port", str(port), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        server = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT)
    end = time.monotonic() + START
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"no server for {policy}; its log is {log}")
            time.sleep(0.5)
        yield json.load(urlopen(f"http://127.0.0.1:{port}/version"))["version"]
    finally:
        server.terminate()
        server.wait(60)


def answers(url: str) -> bool:
    """Whether somebody answers there."""
    try:
        return bool(urlopen(url).status == 200)
    except URLError:
        return False


def table(runs: Sequence[Any], plain: str, policy: str) -> Table:
    """Without and with pruning, and with / without, for every number of streams."""
    made = Table("streams", "what", "without", policy, "ratio", title="medians over rounds")
    rows = {"ttft_median": 1000, "ttft_p95": 1000, "requests_per_s": 1, "tokens_per_s": 1, "kv_peak": 100}
    for i, first in enumerate(runs[0]["levels"]):
        for name, factor in rows.items():
            without, pruned = (
                factor * median(run["levels"][i][name] for run in runs if run["policy"] == arm)
                for arm in (plain, policy)
            )
            unit = {1000: " ms", 100: " %"}.get(factor, "")
            ratio = f"{pruned / without:.2f}" if without else "-"
            made.add_row(str(first["streams"]), name + unit, f"{without:.1f}", f"{pruned:.1f}", ratio)
        made.add_section()
    return made


def machine() -> str:
    """The processor's name, and how many cores there are for us."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()

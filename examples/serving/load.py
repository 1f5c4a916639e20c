"""Load on a running server: 1, 2, 4, ... streams, each of which asks as soon as it has its answer.

    python examples/serving/load.py --url http://127.0.0.1:8000 --json load.json

Every request has a picture that no other has, so that neither the prefix cache nor the caches of pictures spare any work
(what they served all the same is in the table); every answer has the same length. A level ends with its last request, or
asks nothing new when its time is over. On one machine the streams take some of the server's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from streams import Level, Plan, measured


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--json", type=Path)
    add_plan(parser)
    args = parser.parse_args()
    levels = asyncio.run(measured(args.url, plan_of(args)))
    Console(width=120).print(table(levels))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(level) for level in levels], indent=1) + "\n")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options of a ``Plan``."""
    usual = Plan()
    parser.add_argument("--streams", type=int, nargs="+", default=usual.streams)
    parser.add_argument("--requests", type=int, default=usual.requests, help="of a level, at least")
    parser.add_argument(
        "--seconds", type=float, default=usual.seconds, help="after which a level asks no more"
    )
    parser.add_argument("--answer", type=int, default=usual.answer, help="tokens of every answer")
    parser.add_argument("--warmup", type=int, default=usual.warmup, help="requests that are not counted")
    parser.add_argument("--size", type=int, default=usual.size, help="pixels of a picture: 112 or 192")


def plan_of(args: argparse.Namespace) -> Plan:
    """What ``add_plan`` has read."""
    return Plan(tuple(args.streams), args.requests, args.seconds, args.answer, args.warmup, args.size)


def table(levels: Sequence[Level]) -> Table:
    """A row a level."""
    columns = ("streams", "requests", "errors", "TTFT ms", "p95", "requests/s", "tokens/s", "KV peak")
    made = Table(*columns, "prompt", "cached", "pictures cached")
    for x in levels:
        made.add_row(
            str(x.streams),
            str(x.requests),
            str(x.errors),
            f"{1000 * x.ttft_median:.0f}",
            f"{1000 * x.ttft_p95:.0f}",
            f"{x.requests_per_s:.2f}",
            f"{x.tokens_per_s:.1f}",
            f"{x.kv_peak:.1%}",
            f"{x.prompt_tokens:.0f}",
            f"{x.prefix_cached:.0%}",
            f"{x.pictures_cached:.0%}",
        )
    return made


if __name__ == "__main__":
    main()

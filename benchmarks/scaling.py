"""Cost of selection, prefill and decode against visual tokens, images of a prompt and prompts of a batch.

A LLaVA with random weights whose vision tower does no work: on a CPU a decoder of 256 x 4 layers, on a GPU one of
LLaVA-1.5-7B's size. Each line is appended to OUT.csv as it is measured; table, exponents (OUT.json) and plot (OUT.png) are of
the last line of every point there, so that several short runs add up.

    python -P benchmarks/scaling.py [--axis visual images batch] [--tokens 576 1024 ...] [--policies ...] [--out OUT]
    python -P benchmarks/scaling.py --show [--markdown] [--out OUT]  # of what was measured before
    python -P benchmarks/scaling.py --predict [--markdown]      # a decode step on H100 and H200: predicted, not measured
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from latency import decode
from micro.table import print_table
from scale import results
from scale.fit import AXES, fits
from scale.measure import UNPRUNED, Point, measure
from scale.model import SIZES, make_model

TOKENS = (576, 1024, 2025, 4096, 8100, 16384, 32761)  # an image is square
IMAGES, BATCHES = (1, 2, 4, 8), (1, 4, 16)
LEAST = 2000  # exponents of visual tokens are fitted from here on: below, the same for every call counts most
PAIRS = 8192  # the most tokens for a policy that compares all pairs
KEEP = 0.25
POLICIES = (
    UNPRUNED,
    f"fastv:layer=2,keep={KEEP}",
    f"feather:layers=1/2,keep={KEEP}",
    f"uniform:layer=2,keep={KEEP}",
    f"divprune:keep={KEEP}",
)


def points(chosen: argparse.Namespace) -> Iterator[Point]:
    """Everything to measure, by axis and size, so that the policies of one point follow one another."""
    for axis in chosen.axis:
        for at in {"visual": chosen.tokens, "images": chosen.images, "batch": chosen.batch}[axis]:
            for policy in chosen.policies:
                point = Point(axis, policy, *_place(axis, at, chosen.tokens[0]))
                if not (compares_pairs(policy) and point.tokens * point.images > PAIRS):
                    yield point


def _place(axis: str, at: int, tokens: int) -> tuple[int, int, int]:
    """(tokens of an image, images, batch)."""
    return {"visual": (at, 1, 1), "images": (tokens, at, 1), "batch": (tokens, 1, at)}[axis]


def compares_pairs(policy: str) -> bool:
    """Whether a policy's choice grows faster than its tokens."""
    from vlmprune import policy_from

    return policy != UNPRUNED and policy_from(policy).growth != "n"


def run(chosen: argparse.Namespace) -> None:
    """Measure and append."""
    gpu = torch.cuda.is_available()
    size = chosen.size or ("llava-1.5-7b" if gpu else "small")
    device = torch.device("cuda" if gpu else "cpu")
    dtype = torch.bfloat16 if gpu else torch.float32
    model = make_model(SIZES[size], device, dtype, chosen.attention)
    for point in points(chosen):
        columns = measure(model, point, chosen.repeat, chosen.seconds)
        results.append(chosen.out.with_suffix(".csv"), results.row_of(model, size, point, columns))
        print(point, *(f"{k}={v}" for k, v in columns.items() if "median" in k), flush=True)


def predict(markdown: bool) -> None:
    """Print decode steps as bytes over bandwidth."""
    if markdown:
        print("\n".join(decode.markdown()))
        return
    title = "predicted, not measured: bytes of a decode step over the bandwidth; bf16, FastV layer 2"
    print_table(title, decode.HEADS, decode.cells(), range(1, len(decode.HEADS)), 2)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES), help="what to vary")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=list(TOKENS), help="visual tokens an image, square numbers"
    )
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES), help="of --tokens' first")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="of --tokens' first")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="as `vlmprune run` takes them")
    parser.add_argument("--size", choices=SIZES, help="of the decoder; llava-1.5-7b on a GPU, else small")
    parser.add_argument("--attention", default="sdpa", help="implementation (transformers)")
    parser.add_argument("--repeat", type=int, default=7, help="timed prefills of a point, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a point, but two prefills at least")
    parser.add_argument("--out", type=Path, default=Path("build/scaling"), help="CSV, JSON and PNG")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--predict", action="store_true", help="decode steps on H100 and H200")
    parser.add_argument("--markdown", action="store_true", help="the table of benchmarks/README.md")
    return parser


def main() -> int:
    """Measure, then show all there is."""
    parser = arguments()
    chosen = parser.parse_args()
    if chosen.repeat < 1:
        parser.error(f"--repeat: expected at least 1, got {chosen.repeat}")
    odd = [n for n in chosen.tokens if math.isqrt(n) ** 2 != n]
    if odd:
        parser.error(f"--tokens: expected square numbers, got {', '.join(map(str, odd))}")
    if chosen.predict:
        predict(chosen.markdown)
        return 0
    table = chosen.out.with_suffix(".csv")
    if not chosen.show:
        run(chosen)
    elif not table.exists():
        parser.error(f"--show: expected {table}, which is not there")
    rows = results.read(table)
    found = fits(rows, LEAST)
    if chosen.markdown:
        print("\n".join(results.markdown(rows, found)))
        return 0
    results.show(rows, found)
    results.write_fits(chosen.out.with_suffix(".json"), rows, found)
    results.draw(chosen.out.with_suffix(".png"), rows, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())

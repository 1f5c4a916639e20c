"""On a CPU: what share of the FLOPs that pruning saves becomes time, and what selection costs.

A LLaVA of hidden 1024, 16 layers and 576 visual tokens with random weights. Every round runs each arm once, so that all meet
the same machine; ratios are taken within rounds. "bare" is the same model cut to the same numbers of rows at the same layers
by slicing, with nothing scored or chosen: what these FLOPs can save on this machine at all.

    python -P benchmarks/cpu_prefill.py [--tiny] [--table | --policies ...] [--batch 1 8] [--rounds 20] [--out NAME]
    python -P benchmarks/cpu_prefill.py --profile [--policies ...]    # no rounds: where the time goes, by operation
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from cpu_bare import bare, twin
from cpu_model import Size, make_model, make_prompt, size
from cpu_rows import RESULTS, save, show

import vlmprune
from vlmprune.bench.rows import spread as percentiles
from vlmprune.models.host.parts import find_parts
from vlmprune.policies.registry import BUILT_IN

UNPRUNED, BARE, WARM_UP = "unpruned", "bare", 2
REAL = Size(
    size(1024, 16, 16, 2752) | {"vocab_size": 32064},
    size(256, 8, 4, 1024) | {"image_size": 336, "patch_size": 14},
    (
        "fastv:layer=2,keep=0.25",
        "feather:layers=4/8,keep=0.3",
        "uniform:layer=0,keep=144",
        "divprune:keep=144",
    ),
)
TINY = Size(
    size(64, 4, 4, 128) | {"vocab_size": 100},
    size(32, 8, 2, 64) | {"image_size": 56, "patch_size": 14},
    ("fastv:layer=2,keep=0.25", "feather:layers=1/2,keep=0.3", "divprune:keep=4"),
)
TABLE = {
    "feather": "layers=4/8,keep=0.22",
    "pyramiddrop": "layers=4/8/12,ratio=0.255",
    "sparsevlm": "layers=2/4/8,tokens=192",
    "sparsevlm_plus": "layers=2/4/8,tokens=192",
    "v2drop": "layers=2/8/11,keep=0.468/0.468/1",
    "mustdrop": "layers=1/3/5/7,keep=0.628",
    "ficoco": "layers=1/2/3,drop=0.365",
    "flowcut": "vision_layers=0/1/2/3/4/5,keep=192",
    "hiprune": "object_layer=3,keep=192",
    "vscan": "layer=8,keep=288,then=96",
    "star": "layer=8,keep=288,then=96",
    "vtw": "layer=5",
    "aim": "layer=7,stages=4,keep=350",
    "lvlm_csp": "scatter=4,prune=6,cluster=137,then=137",
    "scout": "coarse=(uniform:layer=0,keep=115),fine=77,look=10",
    "random_deep": "layer=10,keep=0.33",
}
"""Methods whose stages do not fit into 16 layers, or what they read into a tower of 8: here at half their layers. VTW leaves 180 of 576 tokens in the mean."""
SHOWN = (
    "batch",
    "policy",
    "unpruned ms",
    "pruned ms",
    "FLOPs ratio",
    "speed-up",
    "of FLOPs",
    f"of FLOPs {BARE}",
    f"of {BARE}",
    "saved",
    f"saved {BARE}",
    "selection",
)


def table() -> tuple[str, ...]:
    """Every method of the README's table that has one, at its setting for 192 of 576 tokens."""
    settings = {name: TABLE.get(name) or kind.presets.get(192) for name, kind in BUILT_IN.items()}
    return tuple(f"{name}:{setting}" for name, setting in settings.items() if setting)


@dataclass
class Arm:
    """One way to run the prompt.

    Attributes:
        name: a policy as text, ``UNPRUNED``, or a policy's bare twin.
        model: has hooks of its own, and shares its weights with all others.
        run: what it reports.
    """

    name: str
    model: Any
    run: vlmprune.Run


def prefill(arm: Arm, prompt: dict[str, Tensor]) -> Any:
    """Run the prompt: the report. Raises RuntimeError for logits that are not finite."""
    logits = arm.model(**prompt, use_cache=True, logits_to_keep=1).logits
    if not logits.isfinite().all():
        raise RuntimeError(f"logits: expected finite numbers under {arm.name}, got {logits}")
    return arm.run.report()


def make_arms(model: Any, prompt: dict[str, Tensor], policies: Sequence[str], twins: bool) -> list[Arm]:
    """The unpruned model, every policy and, if wanted, its bare twin, all warmed up."""
    arms, length = [_measured(UNPRUNED, twin(model))], prompt["input_ids"].shape[1]
    for text in policies:
        pruned = twin(model)
        arms.append(Arm(text, pruned, vlmprune.attach(pruned, vlmprune.policy_from(text))))
        report = prefill(arms[-1], prompt)
        if not twins:
            continue
        rows = {layer: length - int(report.visual_tokens) + kept for layer, _, kept in report.stages}
        arms.append(_measured(f"{text} {BARE}", bare(model, rows, report.second_wave)))
    for arm in arms * WARM_UP:
        prefill(arm, prompt)
    return arms


def _measured(name: str, model: Any) -> Arm:
    return Arm(name, model, vlmprune.meter(model).__enter__())


def measure(
    model: Any, prompt: dict[str, Tensor], policies: Sequence[str], rounds: int, twins: bool
) -> list[dict[str, Any]]:
    """A row for each policy; milliseconds, and shares of 1."""
    arms = make_arms(model, prompt, policies, twins)
    reports = [{arm.name: prefill(arm, prompt) for arm in arms} for _ in range(rounds)]
    return [row(text, reports) for text in policies]


def row(text: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rounds say of one policy.

    "of FLOPs" is the speed-up over the ratio of FLOPs, "saved" the share of the saved FLOPs that became time; both also of the
    bare twin, if there is one. "selection" is a share of the unpruned prefill.
    """
    flops, twin_name = reports[0][text].flops, f"{text} {BARE}"
    ratio = flops.full / flops.pruned
    seconds = {name: [r[name].seconds.prefill for r in reports] for name in reports[0]}
    full, pruned = seconds[UNPRUNED], seconds[text]
    columns = {"policy": text, "FLOPs ratio": round(ratio, 3)}
    columns |= spread("unpruned ms", [1e3 * t for t in full]) | spread("pruned ms", [1e3 * t for t in pruned])
    columns |= spread(
        "selection", [r[text].seconds.selection / t for r, t in zip(reports, full, strict=True)]
    )
    for name in [text, twin_name] if twin_name in seconds else [text]:
        suffix = "" if name == text else f" {BARE}"
        speed = [a / b for a, b in zip(full, seconds[name], strict=True)]
        columns |= spread(f"speed-up{suffix}", speed)
        columns |= spread(f"of FLOPs{suffix}", [s / ratio for s in speed])
        columns |= spread(f"saved{suffix}", [(1 - 1 / s) / (1 - 1 / ratio) for s in speed])
    if twin_name in seconds:
        columns |= spread(f"of {BARE}", [a / b for a, b in zip(seconds[twin_name], pruned, strict=True)])
    return columns


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Columns of the median, 20th and 80th percentile, to five digits."""
    found = percentiles(values)._asdict().items()
    return {f"{name}{'' if key == 'median' else ' ' + key}": float(f"{value:.5g}") for key, value in found}


def profiled(model: Any, prompt: dict[str, Tensor], policies: Sequence[str]) -> None:
    """Print which operations the time of the unpruned model, each policy and its bare twin goes to."""
    for arm in make_arms(model, prompt, policies, twins=True):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            report = prefill(arm, prompt)
        print(
            f"\n{arm.name}: {1e3 * report.seconds.prefill:.1f} ms, selection {1e3 * report.seconds.selection:.2f} ms"
        )
        print(
            seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)
        )


def matrices(model: Any, rows: Sequence[int], tries: int = 5) -> dict[int, float]:
    """Milliseconds of all matrix products of the decoder's layers by how many rows go through, the fastest of some tries."""
    linears = [
        m for layer in find_parts(model).layers for m in layer.modules() if isinstance(m, torch.nn.Linear)
    ]
    found = dict.fromkeys(rows, float("inf"))
    for n in [*rows] * tries:
        inputs = {m.in_features: torch.randn(n, m.in_features, dtype=model.dtype) for m in linears}
        start = time.perf_counter()
        for m in linears:
            m(inputs[m.in_features])
        found[n] = min(found[n], 1e3 * (time.perf_counter() - start))
    return found


def arguments() -> argparse.Namespace:
    """What the command line says, or its error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of four small layers: to try the script")
    parser.add_argument("--rounds", type=int, default=20, help="timed prefills of each arm, at least 2")
    parser.add_argument(
        "--table", action="store_true", help="every method at its setting for 192 of 576 tokens"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], help="prompts at once, one or more sizes"
    )
    parser.add_argument("--images", type=int, default=1, help="images in each prompt, of 576 tokens")
    parser.add_argument("--policies", nargs="+", help=f"in place of {', '.join(REAL.policies)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, measure nothing")
    parser.add_argument(
        "--matrices", action="store_true", help="print what the decoder's matrices take by rows"
    )
    parser.add_argument("--out", help="NAME of results/NAME.csv; none is written without")
    chosen = parser.parse_args()
    for name, got, least in (
        ("rounds", chosen.rounds, 2),
        ("batch", min(chosen.batch), 1),
        ("images", chosen.images, 1),
    ):
        if got < least:
            parser.error(f"--{name}: expected at least {least}, got {got}")
    return chosen


def main() -> int:
    """A table on the terminal, and all columns in a CSV."""
    chosen = arguments()
    s, rows = TINY if chosen.tiny else REAL, list[dict[str, Any]]()
    model = make_model(s, torch.device("cpu"), getattr(torch, chosen.dtype))
    policies = chosen.policies or (table() if chosen.table else s.policies)
    for batch in chosen.batch:
        prompt = make_prompt(model, chosen.images, batch)
        with torch.inference_mode():
            if chosen.matrices:
                length = prompt["input_ids"].shape[1]
                for n, ms in matrices(model, [length, length // 2, length // 3, length // 6, 1]).items():
                    print(f"{n} rows: {ms:.1f} ms, {1e3 * ms / n:.0f} us a row")
            elif chosen.profile:
                profiled(model, prompt, policies)
            else:
                shape = {"dtype": chosen.dtype, "images": chosen.images, "batch": batch}
                found = measure(model, prompt, policies, chosen.rounds, twins=not chosen.table)
                rows += [shape | columns for columns in found]
    if rows:
        show(rows, [name for name in SHOWN if name in rows[0]])
    if chosen.out and rows:
        save(rows, RESULTS / f"{chosen.out}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())

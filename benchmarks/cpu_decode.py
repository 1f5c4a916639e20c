"""On a CPU: the time of a decode step after pruning, against the unpruned model's, from 576 to 8,064 visual tokens.

The LLaVA of ``cpu_prefill.py`` and prompts of 1, 7 and 14 images. Every round runs a few steps of each arm, one after the other, so
that all meet the same machine; ratios are taken within rounds. The cache is transformers' own, which copies itself at each step.

    python -P benchmarks/cpu_decode.py [--tiny] [--images 1 7 14] [--policies ...] [--rounds 12] [--out NAME]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from cpu_bare import twin
from cpu_model import WORD, make_model, make_prompt
from cpu_prefill import REAL, TINY, UNPRUNED, spread
from cpu_rows import RESULTS, save, show

import vlmprune
from vlmprune.models.host.cache_view import resident_bytes

POLICIES = ("uniform:layer=0,keep=0.25", "fastv:layer=2,keep=0.25", "feather:layers=4/8,keep=0.3")
TINY_POLICIES = ("uniform:layer=0,keep=0.25", "fastv:layer=2,keep=0.25")
SHOWN = (
    "visual tokens",
    "policy",
    "unpruned ms",
    "pruned ms",
    "speed-up",
    "speed-up p20",
    "unpruned KV MB",
    "KV MB",
)
STEPS = 3


class Decoding:
    """One model behind its prompt; megabytes of its cache."""

    def __init__(self, model: Any, prompt: dict[str, Tensor]) -> None:
        self.model = model
        self.cache = model(**prompt, use_cache=True, logits_to_keep=1).past_key_values
        self.megabytes = round(resident_bytes(self.cache) / 1e6, 1)
        self.token = torch.full_like(prompt["input_ids"][:, :1], WORD)
        self.seconds()  # warms up

    def seconds(self) -> float:
        """Of a step: the mean of a few."""
        start = time.perf_counter()
        for _ in range(STEPS):
            logits = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits
        taken = (time.perf_counter() - start) / STEPS
        if not logits.isfinite().all():
            raise RuntimeError(f"logits: expected finite numbers, got {logits}")
        return taken


def measure(model: Any, images: int, policies: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each policy."""
    prompt, models = make_prompt(model, images), {UNPRUNED: model}  # without any hook of ours
    for text in policies:
        models[text] = twin(model)
        vlmprune.attach(models[text], vlmprune.policy_from(text))
    running = {name: Decoding(each, prompt) for name, each in models.items()}
    times = [{name: each.seconds() for name, each in running.items()} for _ in range(rounds)]
    visual = int((prompt["input_ids"] == model.config.image_token_index).sum())
    return [
        {
            "visual tokens": visual,
            "policy": text,
            **spread("unpruned ms", [1e3 * t[UNPRUNED] for t in times]),
            **spread("pruned ms", [1e3 * t[text] for t in times]),
            **spread("speed-up", [t[UNPRUNED] / t[text] for t in times]),
            "unpruned KV MB": running[UNPRUNED].megabytes,
            "KV MB": running[text].megabytes,
        }
        for text in policies
    ]


def main() -> int:
    """A table on the terminal, and all columns in a CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of four small layers: to try the script")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 7, 14], help="of 576 visual tokens each")
    parser.add_argument("--rounds", type=int, default=12, help=f"of {STEPS} steps of each arm, at least 2")
    parser.add_argument("--policies", nargs="+", help=f"in place of {', '.join(POLICIES)}")
    parser.add_argument("--out", help="NAME of results/NAME.csv; none is written without")
    chosen = parser.parse_args()
    if chosen.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {chosen.rounds}")
    model = make_model(TINY if chosen.tiny else REAL, torch.device("cpu"), torch.float32)
    policies = chosen.policies or (TINY_POLICIES if chosen.tiny else POLICIES)
    with torch.inference_mode():
        rows = [row for n in chosen.images for row in measure(model, n, policies, chosen.rounds)]
    show(rows, SHOWN)
    if chosen.out:
        save(rows, RESULTS / f"{chosen.out}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())

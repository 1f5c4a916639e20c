"""Prefill of a LLaVA of real size, unpruned and pruned, with random weights: what pruning saves of it, and what it costs.

The sizes are LLaVA-1.5-7B's: 32 layers of 4,096, a CLIP-L/336 tower. One JSON line for each attention, number of images and
policy. `--tiny` tries the same anywhere on a model of six layers; its times mean nothing.

    python -P benchmarks/prefill.py [--tiny] [--repeat 15] [--images 1 5] [--attention sdpa vlmprune] [--policies ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

import vlmprune

REFUSED = 77  # exit code of a benchmark that cannot run here
WARM_UP = 3  # prefills of one shape: the first runs as an op, the second makes the plan, the third has it
UNPRUNED, WORD = "unpruned", 5


@dataclass(frozen=True)
class Size:
    """A model, and policies for it: a budget is counted per image."""

    text: dict[str, int]
    tower: dict[str, int]
    policies: tuple[str, ...]


def size(width: int, layers: int, heads: int, inner: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }


REAL = Size(
    size(4096, 32, 32, 11008) | {"vocab_size": 32064},
    size(1024, 24, 16, 4096) | {"image_size": 336, "patch_size": 14},
    (UNPRUNED, "fastv:layer=2,keep=64", "feather:layers=8/16,keep=0.22", "fastervlm:keep=64"),
)
TINY = Size(
    size(64, 6, 4, 128) | {"vocab_size": 100},
    size(32, 3, 2, 64) | {"image_size": 56, "patch_size": 14},
    (UNPRUNED, "fastv:layer=2,keep=4", "feather:layers=2/4,keep=0.22", "fastervlm:keep=4"),
)


def make_model(s: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """Random weights, drawn on the device."""
    torch.manual_seed(0)
    text, tower = LlamaConfig(**s.text, max_position_embeddings=8192), CLIPVisionConfig(**s.tower)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=s.text["vocab_size"] - 1)
    with device:
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def make_prompt(model: Any, images: int) -> dict[str, Tensor]:
    """35 tokens of text, images with one between them, 29 of text."""
    tower, device = model.config.vision_config, model.device
    seen = [model.config.image_token_index] * (tower.image_size // tower.patch_size) ** 2
    ids = torch.tensor([[WORD] * 35 + [*seen, WORD] * images + [WORD] * 29], device=device)
    g = torch.Generator(device).manual_seed(0)
    shape = images, 3, tower.image_size, tower.image_size
    pixels = torch.randn(shape, generator=g, device=device, dtype=model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def timed(call: Callable[[], object], gpu: bool) -> tuple[float, float | None]:
    """Milliseconds until a call returns, and between two events around it on a GPU, which has to be idle before."""
    if not gpu:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start), None
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    call()
    last.record()
    host = 1e3 * (time.perf_counter() - start)
    last.synchronize()
    return host, first.elapsed_time(last)


def launches(call: Callable[[], object]) -> int:
    """Kernels that one call starts on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    on_device = (e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


def percentiles(times: list[float]) -> dict[str, float]:
    """20th, 50th and 80th."""
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    return {"p20": round(low, 3), "median": round(statistics.median(times), 3), "p80": round(high, 3)}


def measure(model: Any, prompt: dict[str, Tensor], policy: str, repeat: int) -> dict[str, Any]:
    """One policy's prefills. Raises RuntimeError for logits that are not finite."""
    gpu = model.device.type == "cuda"

    def prefill() -> Any:
        return model(**prompt, use_cache=True, logits_to_keep=1)

    pruned = policy != UNPRUNED
    scope = vlmprune.prune(model, vlmprune.policy_from(policy)) if pruned else nullcontext()
    with torch.no_grad(), scope as run:
        for _ in range(WARM_UP):
            logits = prefill().logits
        if not logits.isfinite().all():
            raise RuntimeError(f"logits: expected finite numbers under {policy}, got {logits}")
        host, device = zip(*(timed(prefill, gpu) for _ in range(repeat)), strict=True)
        kernels = launches(prefill) if gpu else None
    return {
        "policy": policy,
        "device ms": percentiles(list(device)) if gpu else None,
        "host ms": percentiles(list(host)),
        "launches": kernels,
        "stages": run.report().paths if pruned else (),
    }


def run(s: Size, chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for everything chosen."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = make_model(s, device, torch.bfloat16 if gpu else torch.float32)
    where = {"device": torch.cuda.get_device_name() if gpu else "cpu", "dtype": str(model.dtype)}
    where |= {"layers": s.text["num_hidden_layers"], "hidden": s.text["hidden_size"]}
    for attention in chosen.attention:
        model.set_attn_implementation(attention)
        for images in chosen.images:
            prompt = make_prompt(model, images)
            what = {"attention": attention, "images": images, "tokens": prompt["input_ids"].shape[1]}
            for policy in chosen.policies or s.policies:
                yield where | what | measure(model, prompt, policy, chosen.repeat)


def main() -> int:
    """One JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a model of six small layers: to try the script")
    parser.add_argument("--repeat", type=int, default=15, help="timed prefills of each, at least 2")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5], help="images of a prompt")
    parser.add_argument("--attention", nargs="+", default=["sdpa", "vlmprune"], help="implementations")
    parser.add_argument("--policies", nargs="+", help=f"in place of {', '.join(REAL.policies)}")
    chosen = parser.parse_args()
    if chosen.repeat < 2:
        parser.error(f"--repeat: expected at least 2, got {chosen.repeat}")
    if not chosen.tiny and not torch.cuda.is_available():
        print("expected a CUDA device or --tiny, got a CPU")
        return REFUSED
    for line in run(TINY if chosen.tiny else REAL, chosen):
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

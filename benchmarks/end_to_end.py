"""The trained glyphworld model, unpruned and pruned, on whatever device there is: answers, times, tokens, FLOPs.

Small (8 layers, 196 visual tokens): it shows that the whole path works and what it costs, not what a 7B model would gain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "examples" / "glyphworld"
POLICIES = ("fastv:layer=2,keep=40", "feather:layers=2/5,keep=0.3,stride=3", "uniform:layer=2,keep=40")
REFUSED = 77  # exit code of a benchmark that cannot run here


def main() -> int:
    """One JSON line per policy and dtype."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=20, help="timed generations of each policy")
    parser.add_argument("--attention", default="sdpa", help="the model's attention implementation")
    chosen = parser.parse_args()
    missing = [name for name in ("transformers", "PIL", "tokenizers") if find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")
        return REFUSED
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        for line in run(device, dtype, chosen.attention, chosen.repeat):
            print(json.dumps(line), flush=True)
    return 0


def run(device: torch.device, dtype: torch.dtype, attention: str, repeat: int) -> list[dict[str, Any]]:
    """Every policy on the first question of the first scene: median and 20th and 80th percentile of ``repeat`` runs."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import vlmprune
    from vlmprune.policies import policy_from

    processor = AutoProcessor.from_pretrained(FOLDER / "checkpoint")
    kind = {"dtype": dtype, "attn_implementation": attention}
    model = AutoModelForImageTextToText.from_pretrained(FOLDER / "checkpoint", **kind).to(device).eval()
    scene = json.loads((FOLDER / "images" / "questions.json").read_text())[0]
    image, question = Image.open(FOLDER / "images" / scene["image"]), scene["qa"][0]
    inputs = processor(text=question["prompt"], images=image, return_tensors="pt").to(device, dtype)
    lines = []
    for text in (None, *POLICIES):
        scope = nullcontext() if text is None else vlmprune.prune(model, policy_from(text))
        with scope as pruned:
            prefill = [_seconds(model, inputs, 1) for _ in range(repeat + 1)][1:]
            whole = [_seconds(model, inputs, 16) for _ in range(repeat + 1)][1:]
            out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        lines.append(
            {
                "policy": text or "unpruned",
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "dtype": str(dtype),
                "attention": attention,
                "answer": answer.strip(),
                "truth": question["answer"],
                "one token ms": _percentiles(prefill),
                "16 tokens ms": _percentiles(whole),
                "report": None if pruned is None else pruned.report().as_dict(),
            }
        )
    return lines


def _seconds(model: Any, inputs: Any, tokens: int) -> float:
    """One generation of exactly ``tokens`` tokens, with everything it launches."""
    start = time.perf_counter()
    model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ranked = sorted(1e3 * s for s in seconds)
    at = {"p20": 0.2, "p80": 0.8}
    low_high = {name: ranked[round(share * (len(ranked) - 1))] for name, share in at.items()}
    return {"median": round(statistics.median(ranked), 3)} | {k: round(v, 3) for k, v in low_high.items()}


if __name__ == "__main__":
    sys.exit(main())

"""Writes the checkpoint whose weights are the mean of others', which had a start in common ("model soup", arXiv 2203.05482).

    python examples/glyphworld/average.py --checkpoints A B --out C

Everything but the weights is the first one's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration


def main() -> None:
    """Load, average, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True, help="folders, two or more")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    args = parser.parse_args()
    if len(args.checkpoints) < 2:
        parser.error(f"--checkpoints: expected two or more, got {args.checkpoints[0]}")
    if args.out.exists():
        parser.error(f"--out: expected a new folder, got {args.out}, which exists")
    models = [LlavaForConditionalGeneration.from_pretrained(path) for path in args.checkpoints]
    if any(_shapes(model) != _shapes(models[0]) for model in models):
        parser.error("--checkpoints: expected models of one shape, got others")
    average(models).save_pretrained(args.out)
    AutoProcessor.from_pretrained(args.checkpoints[0]).save_pretrained(args.out)


def _shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.state_dict().items()}


def average(models: list[LlavaForConditionalGeneration]) -> LlavaForConditionalGeneration:
    """The first of ``models``, with the mean of all weights, taken in float32."""
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([s[name].float() for s in states]).mean(0) for name in states[0]}
    models[0].load_state_dict({name: value.to(states[0][name].dtype) for name, value in mean.items()})
    return models[0]


if __name__ == "__main__":
    main()

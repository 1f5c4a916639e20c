"""Searches how many visual tokens each layer needs (G-Search, P-Sigmoid), and compares with FastV at the same FLOPs.

    python examples/glyphworld/search_schedule.py --dtype bfloat16

The score is the share of exact answers on scenes of the search; what is printed is that on others.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoProcessor, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parent))  # the folder only: a checkout must stay off the path

from accuracy import answer
from make_questions import questions_of, seed_range

import vlmprune
from vlmprune.flops import DecoderShape, decoder_flops, layer_inputs, mean_tokens
from vlmprune.policies import PruningPolicy, g_search, p_sigmoid, scheduled
from vlmprune.policies.schedule import stage_counts

FIRST = 2  # FastV's attention is that of the layer before, and a first layer's ranks tokens otherwise
STEEPNESS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


class Scored:
    """A model, some questions, and the share of them that it answers exactly under a policy."""

    def __init__(self, checkpoint: Path, dtype: str, device: str, batch: int) -> None:
        self.processor, self.batch, self.device = AutoProcessor.from_pretrained(checkpoint), batch, device
        model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        self.calls = 0

    def questions(self, seeds: range) -> list:
        """Pictures and what to ask about them."""
        side = self.model.config.vision_config.image_size
        return [pair for seed in seeds for pair in questions_of(seed, side)]

    def __call__(self, policy: PruningPolicy | None, asked: list) -> float:
        """The share of right answers."""
        self.calls += 1
        with vlmprune.meter(self.model) if policy is None else vlmprune.prune(self.model, policy):
            said = list(answer(self.model, self.processor, asked, self.batch))
        return sum(text == entry["answer"] for text, (_, entry) in zip(said, asked, strict=True)) / len(asked)

    @property
    def shape(self) -> DecoderShape:
        """The decoder's."""
        text = self.model.config.text_config
        return DecoderShape(
            text.num_hidden_layers,
            text.hidden_size,
            text.num_attention_heads,
            text.num_key_value_heads,
            text.head_dim,
            text.intermediate_size,
        )


def main() -> None:
    """Search, then print a line for each way to spend as much."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--seeds", type=seed_range, default=range(70201, 70231), help="scenes of the search")
    parser.add_argument(
        "--others", type=seed_range, default=range(70301, 70361), help="scenes of the figures"
    )
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the score")
    parser.add_argument("--levels", type=int, default=16, help="shares are multiples of one in so many")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    scored = Scored(args.checkpoint, args.dtype, args.device, args.batch)
    calibration, others = scored.questions(args.seeds), scored.questions(args.others)
    side = scored.model.config.vision_config.image_size // scored.model.config.vision_config.patch_size
    visual, text, shape = side * side, 12, scored.shape  # the questions' text is about a dozen tokens
    layers, fastv, start = range(FIRST, shape.layers), vlmprune.FastV(), time.perf_counter()

    def lengths(policy: PruningPolicy) -> list[int]:
        return layer_inputs(shape.layers, visual, stage_counts(policy, visual))

    def cut(policy: PruningPolicy) -> float:
        full = decoder_flops(shape, [visual + text] * shape.layers)
        return 1 - decoder_flops(shape, [n + text for n in lengths(policy)]) / full

    def score(policy: PruningPolicy) -> float:
        return scored(policy, calibration)

    shares = g_search(score, fastv, layers, args.tolerance, levels=args.levels)
    found = {f"G-Search {shares}": scheduled(fastv, layers, shares)}
    mean = mean_tokens(lengths(found[f"G-Search {shares}"])) / visual
    curves = {k: scheduled(fastv, layers, p_sigmoid(shape.layers, k, mean, first=FIRST)) for k in STEEPNESS}
    steepness = max(curves, key=lambda k: score(curves[k]))
    found[f"P-Sigmoid, steepness {steepness}"] = curves[steepness]
    spent = cut(scheduled(fastv, layers, shares))
    keep = vlmprune.keep_for_flops(fastv, spent, shape, visual, text)
    found[f"FastV at layer 2, keep {keep}"] = fastv.at(keep)
    deep = max(k for k in range(shape.layers) if k == 0 or cut(vlmprune.VTW(k)) >= spent)
    found[f"VTW at layer {deep}"] = vlmprune.VTW(deep)
    seconds = time.perf_counter() - start
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{scored.calls} scores of {len(calibration)} questions in {seconds:.0f} s; of {len(others)} others right, "
        f"FLOPs cut, mean visual tokens of {visual}:",
        markup=False,
    )
    console.print(f"{scored(None, others):6.1%}  {0:6.1%}  {visual:6.1f}  unpruned")
    for name, policy in found.items():
        tokens = mean_tokens(lengths(policy))
        console.print(
            f"{scored(policy, others):6.1%}  {cut(policy):6.1%}  {tokens:6.1f}  {name}", markup=False
        )


if __name__ == "__main__":
    main()

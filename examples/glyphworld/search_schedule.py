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
from vlmprune.eval.arms import PromptSize, planned
from vlmprune.models.host.parts import decoder_shape
from vlmprune.policies import PruningPolicy, g_search, p_sigmoid, scheduled

FIRST = 2  # FastV ranks by the layer before, and the attention of a first layer ranks tokens otherwise
STEEPNESS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
TEXT = 12  # tokens of a question, about


class Scored:
    """A model, some questions, and the share of them that it answers exactly under a policy."""

    def __init__(self, checkpoint: Path, dtype: str, device: str, batch: int) -> None:
        self.processor, self.batch = AutoProcessor.from_pretrained(checkpoint), batch
        model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        vision = model.config.vision_config
        self.side = vision.image_size
        visual = (vision.image_size // vision.patch_size) ** 2
        self.prompt = PromptSize(decoder_shape(model.config), visual, TEXT)
        self.calls = 0

    def questions(self, seeds: range) -> list:
        """Pictures and what to ask about them."""
        return [pair for seed in seeds for pair in questions_of(seed, self.side)]

    def __call__(self, policy: PruningPolicy | None, asked: list) -> float:
        """The share of right answers."""
        self.calls += 1
        with vlmprune.meter(self.model) if policy is None else vlmprune.prune(self.model, policy):
            said = list(answer(self.model, self.processor, asked, self.batch))
        return sum(text == entry["answer"] for text, (_, entry) in zip(said, asked, strict=True)) / len(asked)

    def cost(self, policy: PruningPolicy) -> tuple[float, float]:
        """Which share of the FLOPs a policy saves, and the mean of visual tokens over the layers."""
        return planned(policy, self.prompt)


def main() -> None:
    """Search, then print a line for each way to spend as much."""
    args = _arguments()
    scored = Scored(args.checkpoint, args.dtype, args.device, args.batch)
    calibration, others = scored.questions(args.seeds), scored.questions(args.others)
    start = time.perf_counter()
    found = search(scored, calibration, args.tolerance, args.levels)
    seconds = time.perf_counter() - start
    visual, console = scored.prompt.visual, Console(soft_wrap=True, highlight=False)
    console.print(
        f"{scored.calls} scores of {len(calibration)} questions in {seconds:.0f} s; of {len(others)} others right, "
        f"FLOPs cut, mean visual tokens of {visual}:",
        markup=False,
    )
    console.print(f"{scored(None, others):6.1%}  {0:6.1%}  {visual:6.1f}  unpruned")
    for name, policy in found.items():
        cut, tokens = scored.cost(policy)
        console.print(f"{scored(policy, others):6.1%}  {cut:6.1%}  {tokens:6.1f}  {name}", markup=False)


def search(scored: Scored, asked: list, tolerance: float, levels: int) -> dict[str, PruningPolicy]:
    """What is found on these questions, and FastV and VTW at as many FLOPs."""
    prompt, fastv = scored.prompt, vlmprune.FastV()
    depth = prompt.shape.layers
    layers = range(FIRST, depth)

    def score(policy: PruningPolicy) -> float:
        return scored(policy, asked)

    shares = g_search(score, fastv, layers, tolerance, levels=levels)
    greedy = scheduled(fastv, layers, shares)
    spent, tokens = scored.cost(greedy)
    mean = tokens / prompt.visual
    curves = {k: scheduled(fastv, layers, p_sigmoid(depth, k, mean, first=FIRST)) for k in STEEPNESS}
    steepness = max(curves, key=lambda k: score(curves[k]))
    keep = vlmprune.keep_for_flops(fastv, spent, prompt.shape, prompt.visual, prompt.text)
    deep = max(k for k in range(depth) if k == 0 or scored.cost(vlmprune.VTW(k))[0] >= spent)
    return {
        f"G-Search {shares}": greedy,
        f"P-Sigmoid, steepness {steepness}": curves[steepness],
        f"FastV at layer 2, keep {keep}": fastv.at(keep),
        f"VTW at layer {deep}": vlmprune.VTW(deep),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    add("--seeds", type=seed_range, default=range(70201, 70231), help="scenes of the search")
    add("--others", type=seed_range, default=range(70301, 70361), help="scenes of the figures")
    add("--tolerance", type=float, default=0.02, help="of the score")
    add("--levels", type=int, default=16, help="shares are multiples of one in so many")
    add("--batch", type=int, default=64)
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()

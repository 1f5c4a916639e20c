"""Scout at work on one picture: what it looks at first, where the question then looks, and what joins.

python -P studies/where_to_look/pictures.py --model CKPT --image FILE --prompt "where is the red star ?" --out scout.png
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # studies/ only: a checkout must stay off the path

import numpy as np
import torch
from common.asking import exit_code
from PIL import Image
from torch import Tensor

from vlmprune import Scout, policy_from
from vlmprune.checkpoints import Checkpoint, build_text, generate, make_inputs
from vlmprune.errors import check
from vlmprune.eval.plots import make_figure, to_png
from vlmprune.eval.store import write
from vlmprune.images import open_rgb
from vlmprune.models import patch_grid
from vlmprune.policies.base import TokenContext

POLICY = "scout:coarse=(uniform:layer=0,keep=0.125),fine=0.0833,look=5"
NEW_TOKENS = 16
DARK = 0.22
"""How bright tokens are that nobody keeps."""


@dataclass(frozen=True)
class Watched(Scout):
    """Scout, which notes down where the last row looks, by its layer."""

    seen: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def _looked(self, ctx: TokenContext, ran: Tensor) -> Tensor:
        """Scout's own."""
        self.seen[ctx.layer] = super()._looked(ctx, ran)
        return self.seen[ctx.layer]


@dataclass(frozen=True)
class Scene:
    """What Scout did with one picture of ``rows x columns`` tokens.

    Attributes:
        coarse, fine: ``[rows, columns]`` bool, the tokens of either wave.
        scores: ``[rows, columns]`` the last row's attention spread over all others, in [0, 1]; 0 at coarse tokens.
        answer: what the model said.
    """

    coarse: np.ndarray[Any, Any]
    fine: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    answer: str


def main() -> int:
    """Ask, draw, write. Exit code 2 for bad input, with one line that says what was expected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder whose images share one grid")
    add("--image", type=Path, required=True)
    add("--prompt", required=True)
    add("--policy", default=POLICY, help="a Scout that looks")
    add("--out", type=Path, required=True, help="a PNG file")
    chosen = parser.parse_args()
    return exit_code(lambda: run(chosen))


def run(chosen: argparse.Namespace) -> None:
    """Look, draw, write."""
    scene = look_at(Checkpoint(chosen.model, "cpu", "float32"), chosen.image, chosen.prompt, chosen.policy)
    write(chosen.out, draw_scene(open_rgb(chosen.image, "image"), chosen.prompt, scene))
    print(scene.answer)


def look_at(checkpoint: Checkpoint, image: Path, prompt: str, policy: str) -> Scene:
    """Ask the model with the Scout that ``policy`` says.

    Raises:
        InputError: another policy or one that draws its fine tokens, or a bad image or prompt.
        ModelError: a model whose images do not share one grid.
    """
    scout = policy_from(policy)
    looks = isinstance(scout, Scout) and scout.by != "random"
    check(looks, "policy", "a scout that looks", repr(policy))
    settings = {setting.name: getattr(scout, setting.name) for setting in fields(scout) if setting.init}
    watched, grid = Watched(**settings), patch_grid(checkpoint.config)
    processor = checkpoint.processor
    inputs = make_inputs(processor, [build_text(processor, prompt, 1)], [[open_rgb(image, "image")]], "image")
    run, new = generate(checkpoint.model, inputs, watched, max_new_tokens=NEW_TOKENS)
    marks = torch.zeros(2, grid[0] * grid[1], dtype=torch.bool)
    for stage, mark in enumerate(marks):
        mark[run.kept_at(stage, 0)] = True
    coarse, kept = marks.view(2, *grid)
    scores = watched.seen[scout.look][0].view(grid).float().masked_fill(coarse, 0.0)
    said = processor.tokenizer.decode(new[0], skip_special_tokens=True).strip()
    return Scene(coarse.numpy(), (kept & ~coarse).numpy(), (scores / scores.max()).numpy(), said)


def draw_scene(image: Image.Image, prompt: str, scene: Scene) -> bytes:
    """Four panels: the picture, its coarse tokens, where the question looks from them, and the two waves together."""
    figure, panels = make_figure(1, 4, 2.6, 3.0)
    rows, columns = scene.coarse.shape
    picture = np.asarray(image.resize((columns * 8, rows * 8))) / 255
    names = (
        prompt,
        f"1. {scene.coarse.sum()} coarse tokens",
        "2. where the last row looks",
        f"3. {scene.fine.sum()} fine ones join: {scene.answer}",
    )
    shown = (None, scene.coarse, None, scene.coarse | scene.fine)
    for panel, name, kept in zip(panels, names, shown, strict=True):
        light = 1.0 if kept is None else np.where(np.kron(kept, np.ones((8, 8))), 1.0, DARK)[..., None]
        panel.imshow(picture * light)
        panel.set_title(name, fontsize=8)
        panel.set_axis_off()
    panels[2].imshow(np.kron(scene.scores, np.ones((8, 8))), cmap="magma", alpha=0.75, vmin=0, vmax=1)
    return to_png(figure)


if __name__ == "__main__":
    sys.exit(main())

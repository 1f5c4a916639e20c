"""Seeded inputs of every case at one setting, each drawn when first asked for, and the true scores."""

from __future__ import annotations

from functools import cached_property
from zlib import crc32

import torch
from torch import Tensor

from vlmprune import ops
from vlmprune.ops import reference
from vlmprune.ops.scoring import Scoring

from .shapes import Setting

GATHERED_LAYERS = 2  # the layers whose K and V a stage gathers in the roofline that the goals come from


class Inputs:
    """Tensors of a prompt at a pruning stage: attention of one layer, what is gathered, and visual features.

    Another seed is another prompt of the same shape.
    """

    def __init__(self, setting: Setting, seed: int = 0) -> None:
        self.setting, self.shape, self.model = setting, setting.shape, setting.shape.model
        self.device, self.dtype, self.seed = setting.device, setting.dtype, seed
        self.plans: dict[tuple[str, ...], ops.PrunePlan | ops.ScoredPlan] = {}

    def draw(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers that depend on name and seed only: zeros would be quicker to move and hide what was not written."""
        x = torch.randn(*shape, generator=self._generator(name), device=self.device)
        return x.to(dtype or self.dtype)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(crc32(name.encode()) + self.seed)

    @cached_property
    def query(self) -> Tensor:
        """``[1, H, S, D]`` of the whole prompt; the ops read the listed rows of it."""
        return self.draw("query", 1, self.model.heads, self.shape.length, self.model.head_dim)

    @cached_property
    def key(self) -> Tensor:
        """``[1, Hkv, S, D]``."""
        return self.draw("key", 1, self.model.kv_heads, self.shape.length, self.model.head_dim)

    @cached_property
    def rows(self) -> Tensor:
        """The last rows of the prompt, ``[1, R]``."""
        S = self.shape.length
        return torch.arange(S - self.setting.n_rows, S, device=self.device)[None]

    @cached_property
    def columns(self) -> Tensor:
        """Positions of the visual tokens, ``[1, N]``."""
        first = self.shape.before
        return torch.arange(first, first + self.shape.visual, device=self.device)[None]

    @cached_property
    def scale(self) -> float:
        """Softmax scale."""
        return self.model.head_dim**-0.5

    @cached_property
    def lse(self) -> Tensor:
        """``[1, H, S]`` as an attention kernel leaves it behind; here only the listed rows are filled in."""
        out = torch.zeros(self.query.shape[:3], device=self.device)
        out[:, :, -self.setting.n_rows :] = self.true_lse
        return out

    @cached_property
    def true_lse(self) -> Tensor:
        """``[1, H, R]`` from operands widened to float32."""
        query, key = self.query[:, :, -self.setting.n_rows :].float(), self.key.float()
        return reference.row_lse(
            Scoring.checked(query, key, rows=self.rows, columns=self.rows, scale=self.scale)
        )

    @cached_property
    def true_scores(self) -> Tensor:
        """``[1, N]`` from operands widened to float32: mean over rows and heads, softmax over all keys."""
        query, key = self.query[:, :, -self.setting.n_rows :].float(), self.key.float()
        probabilities = torch.softmax(masked_logits(query, key, self.scale), dim=-1)
        return probabilities.mean((1, 2))[:, self.columns[0]]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """What a stage gathers: hidden states, cos, sin, and K and V of two layers."""
        S, D = self.shape.length, self.model.head_dim
        tables = [self.draw(name, 1, S, D) for name in ("cos", "sin")]
        return [self.draw("hidden", 1, S, self.model.hidden), *tables, *self._caches(GATHERED_LAYERS)]

    @cached_property
    def caches(self) -> list[Tensor]:
        """K and V of every layer, ``[1, Hkv, S, D]`` each."""
        return self._caches(self.model.layers)

    def _caches(self, layers: int) -> list[Tensor]:
        shape = (1, self.model.kv_heads, self.shape.length, self.model.head_dim)
        return [self.draw(f"cache {i}", *shape) for i in range(2 * layers)]

    @cached_property
    def scores(self) -> Tensor:
        """Softmax-like float32 scores of the visual tokens, ``[1, N]``."""
        return self.draw("scores", 1, self.shape.visual, dtype=torch.float32).softmax(-1)

    @cached_property
    def segments(self) -> tuple[list[int], list[int]]:
        """Lengths of five unequal parts of the visual tokens, as tiles of an image are, and how many each keeps."""
        rest = self.shape.visual - 4 * (self.shape.visual // 6)
        lengths = [self.shape.visual // 6] * 4 + [rest]
        return lengths, [max(1, n * self.shape.keep // self.shape.visual) for n in lengths]

    @cached_property
    def index(self) -> Tensor:
        """Positions of the prompt that survive, ``[1, K]`` ascending."""
        return with_text(self, self.scores.topk(self.shape.keep).indices)

    @cached_property
    def features(self) -> Tensor:
        """Visual tokens ``[1, N, hidden]``."""
        return self.draw("features", 1, self.shape.visual, self.model.hidden)

    @cached_property
    def relevance(self) -> Tensor:
        """``[1, N]`` in 0..1."""
        return self.draw("relevance", 1, self.shape.visual, dtype=torch.float32).sigmoid()

    @cached_property
    def chosen(self) -> int:
        """How many tokens a greedy selection keeps: DivPrune's share, 128 of 576 and 640 of 2,880."""
        return self.shape.visual * 2 // 9

    @cached_property
    def clusters(self) -> int:
        """How many tokens a merge or clustering leaves of the visual ones."""
        return max(1, self.shape.visual // 20)

    @cached_property
    def merged(self) -> int:
        """How many tokens a matching merges into others."""
        return self.shape.visual // 4

    @cached_property
    def assignment(self) -> Tensor:
        """``[1, N]`` cluster numbers."""
        generator, shape = self._generator("assignment"), (1, self.shape.visual)
        return torch.randint(self.clusters, shape, generator=generator, device=self.device)


def masked_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled logits of the last rows of a causal prompt against all keys, in the operands' dtype."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    R, S = query.shape[2], key.shape[2]
    later = torch.ones(R, S, dtype=torch.bool, device=key.device).triu(S - R + 1)
    return (query @ key.transpose(2, 3) * scale).masked_fill(later, float("-inf"))


def with_text(x: Inputs, chosen: Tensor) -> Tensor:
    """Positions of the prompt ``[1, K]``, ascending: all text, and the chosen visual ordinals."""
    first, last = x.shape.before, x.shape.before + x.shape.visual
    text = torch.arange(x.shape.length, device=x.device)[None]
    return torch.cat([text[:, :first], chosen + first, text[:, last:]], dim=1).sort(dim=1).values

"""Score, select and gather of one pruning stage: our op against plain PyTorch and against eager attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vlmprune import ops

SYSTEM = 35  # text tokens before the image in LLaVA-1.5's prompt; the rest of the text follows it


@dataclass(frozen=True)
class Stage:
    """One pruning stage of a published model at one image."""

    name: str
    length: int
    visual: int
    keep: int
    heads: int
    kv_heads: int
    hidden: int
    head_dim: int = 128


STAGES = (
    Stage("llava-1.5-7b", 640, 576, 128, 32, 32, 4096),
    Stage("llava-next-7b", 2944, 2880, 384, 32, 32, 4096),
    Stage("qwen2.5-vl-7b", 4160, 4096, 1088, 28, 4, 3584),
)


@dataclass(frozen=True)
class Inputs:
    stage: Stage
    query: Tensor
    key: Tensor
    rows: Tensor
    columns: Tensor
    tensors: list[Tensor]


def make_inputs(stage: Stage, dtype: torch.dtype, device: str) -> Inputs:
    """Query and key of one layer, and what a stage gathers: hidden states, cos and sin."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tensors = [draw(1, stage.length, stage.hidden)] + [
        draw(1, stage.length, stage.head_dim) for _ in range(2)
    ]
    return Inputs(
        stage,
        draw(1, stage.heads, 1, stage.head_dim),
        draw(1, stage.kv_heads, stage.length, stage.head_dim),
        torch.tensor([[stage.length - 1]], device=device),
        torch.arange(SYSTEM, SYSTEM + stage.visual, device=device)[None],
        tensors,
    )


def vlmprune(x: Inputs) -> list[Tensor]:
    return ops.prune_tokens(
        x.query, x.key, x.tensors, rows=x.rows, columns=x.columns, keep=x.stage.keep
    ).tensors


def _keep_and_gather(x: Inputs, scores: Tensor) -> list[Tensor]:
    top = scores.topk(x.stage.keep, dim=-1).indices.sort(dim=-1).values
    stay = torch.ones(1, x.stage.length, dtype=torch.bool, device=scores.device)
    stay[:, SYSTEM : SYSTEM + x.stage.visual] = False
    stay.scatter_(1, top + SYSTEM, True)
    index = stay.nonzero()[:, 1]
    return [t[:, index] for t in x.tensors]


def plain_torch(x: Inputs) -> list[Tensor]:
    key = x.key.repeat_interleave(x.stage.heads // x.stage.kv_heads, dim=1)
    weights = (x.query @ key.transpose(2, 3) * x.stage.head_dim**-0.5).float().softmax(-1)
    return _keep_and_gather(x, weights.mean(1)[:, 0, SYSTEM : SYSTEM + x.stage.visual])


def eager(x: Inputs) -> list[Tensor]:
    key = x.key.repeat_interleave(x.stage.heads // x.stage.kv_heads, dim=1)
    query = x.query.expand(-1, -1, x.stage.length, -1)
    causal = torch.ones(x.stage.length, x.stage.length, dtype=torch.bool, device=key.device).tril()
    logits = (query @ key.transpose(2, 3) * x.stage.head_dim**-0.5).masked_fill(~causal, float("-inf"))
    weights = logits.softmax(-1, dtype=torch.float32)
    return _keep_and_gather(x, weights.mean(1)[:, -1, SYSTEM : SYSTEM + x.stage.visual])


PROVIDERS: dict[str, Callable[[Inputs], list[Tensor]]] = {
    "vlmprune": vlmprune,
    "torch": plain_torch,
    "eager": eager,
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_prune_tokens(benchmark, stage: Stage, dtype: torch.dtype, provider: str) -> None:
    if DEVICE == "cpu" and provider == "eager" and stage.length > 1000:
        pytest.skip("the whole attention matrix of this shape takes gigabytes of CPU memory")
    inputs, run = make_inputs(stage, dtype, DEVICE), PROVIDERS[provider]
    want, got = plain_torch(inputs), run(inputs)
    same = (
        torch.isclose(got[0], want[0]).all(-1).float().mean()
    )  # reduced precision may swap tokens that nearly tie
    assert same > (0.999 if dtype == torch.float32 else 0.95), (
        f"{provider} keeps other tokens than plain PyTorch"
    )

    def call() -> None:
        run(inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{stage.name} {stage.length} -> {stage.keep}, {str(dtype)[6:]}, {DEVICE}"
    benchmark(call)

"""One process of the tensor-parallel test. A file of its own, so that a spawned process can import it by name."""

from __future__ import annotations

import os

import torch
from torch import distributed as dist

import vlmprune
from helpers.tiny import generate, make_batch

ACROSS = (
    vlmprune.Feather(layers=(2, 4), keep=0.5),
    vlmprune.PyramidDrop(layers=(2, 4), positions="pack"),
    vlmprune.SparseVLMPlus(layers=(2, 3), keep=(10, 5), heads=3),
    vlmprune.DART(layer=2, keep=8, pivots=(2, 2)),
)


def chosen(model) -> list:
    said = []
    for policy in ACROSS:
        with vlmprune.prune(model, policy) as run:
            _, logits, _ = generate(model, make_batch([[4, "I", 7], [2, "I", 3]]), 2)
        said.append((logits, [stage.index for stage in run.stages]))
    return said


def one_rank(rank: int, folder: str, port: int) -> None:
    """What one process does: load its shards, prune, write down what it chose."""
    from transformers import LlavaForConditionalGeneration

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = LlavaForConditionalGeneration.from_pretrained(folder, tp_plan="auto").eval()
    model.generation_config.eos_token_id = None
    attn = model.model.language_model.layers[0].self_attn
    with torch.no_grad():
        heads = attn.q_proj(torch.zeros(1, 1, 64)).shape[-1] // attn.head_dim
    torch.save((heads, chosen(model)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()

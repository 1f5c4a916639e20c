"""Tiny random LLaVAs (made on the spot, no download), batches for them, and the masking oracle.

The oracle removes nothing and caches nothing: every step recomputes the whole sequence, and from layer K on the columns
of pruned tokens are masked with -inf. Whatever pruning does must give the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from helpers.device import placed
from vlmprune.policies import Needs, PruningPolicy, Ranking, TokenContext, Uniform, quotas

IMAGE, PAD, BOS, EOS = 199, 0, 1, 2
LAYERS, GRID = 6, 4  # 16 visual tokens per image
STEPS = 4
TOLERANCE = 1e-4  # absolute, on float32 logits of order 10

BEFORE_PREFILL = version.parse(transformers.__version__) >= version.parse("5.18")
"""Since transformers 5.18 generate() encodes images before it calls the model, and passes the features on."""


def upstream(limit: str):
    return pytest.mark.skipif(not BEFORE_PREFILL, reason=f"transformers < 5.18 itself {limit}")


@dataclass(frozen=True)
class Drawn(PruningPolicy):
    """Keeps a random share at several layers, so that no selection rule can hide a wiring error."""

    at: tuple[int, ...] = (2,)
    keep: float = 0.4

    @property
    def layers(self) -> tuple[int, ...]:
        return self.at

    def rank(self, ctx: TokenContext) -> Ranking:
        generator = torch.Generator().manual_seed(ctx.layer)
        return Ranking(torch.rand(ctx.mask.shape, generator=generator), tuple(quotas(ctx, self.keep)))


@dataclass(frozen=True)
class Onlooker(PruningPolicy):
    """Keeps every other token, and what it was shown."""

    layer: int = 2
    asked: Needs = field(default_factory=Needs)
    shown: dict[int, TokenContext] = field(default_factory=dict, hash=False)

    def needs(self, layer: int) -> Needs:
        return self.asked

    def rank(self, ctx: TokenContext) -> Ranking:
        self.shown[self.layer] = ctx
        return Uniform(layer=self.layer, keep=0.5).rank(ctx)


DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def make_model(
    decoder: str = "llama", tower: str = "clip", attn: str = "sdpa", seed: int = 0, **text: Any
) -> LlavaForConditionalGeneration:
    """A six-layer LLaVA with grouped-query attention and large weights, so that mistakes show in the logits."""
    torch.manual_seed(seed)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "vocab_size": 200}
    size |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    size |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.25}
    if decoder == "mistral":
        size["sliding_window"] = None
    vision = TOWERS[tower](
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=14 * GRID,
        patch_size=14,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=DECODERS[decoder](**(size | text)),
        image_token_index=IMAGE,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return placed(model)


def make_batch(specs: list[list[int | str]], seed: int = 0, pad: str = "left") -> dict[str, Tensor]:
    """Samples are lists of "I" (an image) and ints (that many text tokens); shorter ones are padded."""
    generator = torch.Generator().manual_seed(seed)
    samples, images = [], 0
    for spec in specs:
        ids = [BOS]
        for part in spec:
            if part == "I":
                ids += [IMAGE] * (GRID * GRID)
                images += 1
            else:
                ids += torch.randint(3, 198, (int(part),), generator=generator).tolist()
        samples.append(ids)
    width = max(map(len, samples))
    fill = [(PAD, width - len(ids)) for ids in samples]
    rows = [
        [p] * n + ids if pad == "left" else ids + [p] * n for ids, (p, n) in zip(samples, fill, strict=True)
    ]
    ones = [
        [0] * n + [1] * len(i) if pad == "left" else [1] * len(i) + [0] * n
        for i, (_, n) in zip(samples, fill, strict=True)
    ]
    batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(ones)}
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 14 * GRID, 14 * GRID, generator=generator)
    return batch


@contextmanager
def masked(model: Any, dropped: dict[int, Tensor]) -> Iterator[None]:
    """Hide columns ``dropped[layer] [B, S0]`` from every row, from that layer on."""
    text, state = model.get_decoder(), {}

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        length = kwargs["inputs_embeds"].shape[1]
        real = kwargs["attention_mask"]  # None from transformers 5.23 on, where it finds no padding
        real = torch.ones(1, length, dtype=torch.bool) if real is None else real.bool()
        state["mask"] = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & real[:, None, None]

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        mask, length = state["mask"], state["mask"].shape[-1]
        for layer, columns in dropped.items():
            if module.self_attn.layer_idx >= layer:
                hidden = torch.nn.functional.pad(columns, (0, length - columns.shape[1]))
                mask = mask & ~hidden[:, None, None]
        mask = mask | (
            torch.eye(length, dtype=torch.bool) & ~mask.any(-1, keepdim=True)
        )  # padding rows see themselves
        floor = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": floor}

    handles = [text.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in text.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def oracle(
    model: Any, batch: dict[str, Tensor], dropped: dict[int, Tensor], steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy decoding by full recomputation: new tokens ``[B, steps]``, their logits ``[B, steps, V]``, prefill logits."""
    ids, real = batch["input_ids"], batch["attention_mask"]
    pixels = {k: v for k, v in batch.items() if k == "pixel_values"}
    tokens, logits, prefill = [], [], None
    with masked(model, dropped):
        for _ in range(steps):
            positions = (real.long().cumsum(-1) - 1).clamp(min=0)
            out = model(
                input_ids=ids, attention_mask=real, position_ids=positions, use_cache=False, **pixels
            ).logits
            prefill = out if prefill is None else prefill
            last = out[:, -1]
            choice = last.clone()
            choice[:, IMAGE] = float("-inf")  # a generated placeholder would have no image behind it
            tokens.append(choice.argmax(-1))
            logits.append(last)
            ids = torch.cat([ids, tokens[-1][:, None]], 1)
            real = torch.cat([real, real.new_ones(len(real), 1)], 1)
    return torch.stack(tokens, 1), torch.stack(logits, 1), prefill


@torch.no_grad()
def generate(model: Any, batch: dict[str, Tensor], steps: int, **kwargs: Any) -> Any:
    """Greedy ``model.generate`` that returns new tokens and logits the way ``oracle`` does, and the raw output."""
    out = model.generate(
        **batch,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        suppress_tokens=[IMAGE],
        **kwargs,
    )
    return out.sequences[:, -steps:], torch.stack(out.logits, 1), out


def dropped_from(
    run: Any, batch: dict[str, Tensor], placeholders: tuple[int, ...] = (IMAGE,)
) -> dict[int, Tensor]:
    """Columns to hide so that the oracle sees exactly what each recorded stage kept."""
    visual = torch.isin(batch["input_ids"], torch.tensor(placeholders))
    hidden = {}
    for stage in run.stages:
        kept = torch.zeros_like(visual)
        for sample, row in enumerate(stage.index):
            kept[sample, row[row >= 0]] = True
        hidden[stage.layer] = visual & ~kept
    return hidden


@torch.no_grad()
def slow(model, batch, said, steps):
    """The oracle for stages that also merge, reorder or renumber: contents and positions are moved in place.

    What a stage drops is put back, as it was, where it enters a later one again.
    ``said`` maps a stage layer to what the policy answered there: (index, new rows or None, its context, positions).
    """
    text, state = model.get_decoder(), {}

    def enter(module, args, kwargs):
        real = kwargs["attention_mask"].bool()
        state.update(alive=real.clone(), position=(real.long().cumsum(-1) - 1).clamp(min=0))
        state["place"] = torch.arange(real.shape[1]).expand_as(real).clone()  # where each token now stands
        state["aside"] = {}

    def before(module, args, kwargs):
        hidden, i = args[0].clone(), module.self_attn.layer_idx
        alive, position = state["alive"], state["position"]
        if i in said:
            index, rows, ctx, positions = said[i]
            for b, row in enumerate(ctx.positions):
                for token in [token for token in row[row >= 0].tolist() if (b, token) in state["aside"]]:
                    hidden[b, token] = state["aside"].pop((b, token))
            old_hidden, old_position = hidden.clone(), position.clone()
            for b, row in enumerate(index):
                token = ctx.positions[b, row[row >= 0]]
                for gone in {*ctx.positions[b][ctx.mask[b]].tolist()} - {*token.tolist()}:
                    state["aside"][b, gone] = hidden[b, state["place"][b, gone]].clone()
                source = state["place"][b, token]
                place = source.sort().values
                alive[b, state["place"][b, ctx.positions[b][ctx.mask[b]]]] = False
                alive[b, place] = True
                state["place"][b, token] = place
                hidden[b, place] = (
                    old_hidden[b, source] if rows is None else rows[b, : len(place)].to(hidden.dtype)
                )
                position[b, place] = old_position[b, source]
            if positions == "pack":
                position = (alive.long().cumsum(-1) - 1).clamp(min=0)
            state["position"] = position
        n = hidden.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None] & alive[:, None, None]
        mask = mask | (torch.eye(n, dtype=torch.bool) & ~mask.any(-1, keepdim=True))
        floor = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        rope = text.rotary_emb(hidden, position)
        return (hidden,), {**kwargs, "attention_mask": floor, "position_embeddings": rope}

    handles = [text.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in text.layers]
    ids, real, tokens, logits = batch["input_ids"], batch["attention_mask"], [], []
    pixels = {k: v for k, v in batch.items() if k == "pixel_values"}
    for _ in range(steps):
        last = model(input_ids=ids, attention_mask=real, use_cache=False, **pixels).logits[:, -1]
        choice = last.clone()
        choice[:, IMAGE] = float("-inf")
        tokens.append(choice.argmax(-1))
        logits.append(last)
        ids = torch.cat([ids, tokens[-1][:, None]], 1)
        real = torch.cat([real, real.new_ones(len(real), 1)], 1)
    [h.remove() for h in handles]
    return torch.stack(tokens, 1), torch.stack(logits, 1)


def assert_equals_oracle(model, batch, run, tokens, logits) -> None:
    want_tokens, want_logits, _ = oracle(model, batch, dropped_from(run, batch), tokens.shape[1])
    torch.testing.assert_close(logits, want_logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(tokens, want_tokens)

"""A further turn of a padded batch gives each sample what it gets alone; padding then stands in the midst of its rows."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import vlmprune
from helpers import families_oracle as family
from helpers.families import CASES, IMAGE, STEPS, VIDEO, build, prompts
from helpers.tiny import PAD, Drawn, dropped_from, generate, make_batch, make_model, oracle

FIRST = [[4, "I", 7], [2, "I", 5, "I", 3], [9]]
SECOND = [["I", 2], [4], ["I", 5]]
POLICIES = {
    "keeps-positions": vlmprune.FastV(layer=2, keep=0.4, rows="mean"),
    "compacted": vlmprune.FastV(layer=2, keep=5, earlier_kv="compact"),
    "packs": vlmprune.PyramidDrop(layers=(2, 4), positions="pack"),
    "all-leave": vlmprune.VTW(layer=2),
    "merges-and-packs": vlmprune.VisionZip(dominant=5, contextual=2, positions="pack"),
    "packs-and-compacted": vlmprune.FasterVLM(keep=6, earlier_kv="compact", positions="pack"),
}


@pytest.fixture(scope="module")
def model():
    return make_model()


def joined(batches):
    """Batches of one as a batch, padded on the left."""
    width = max(b["input_ids"].shape[1] for b in batches)
    out = {}
    for name, fill in (("input_ids", PAD), ("attention_mask", 0)):
        rows = [torch.nn.functional.pad(b[name], (width - b[name].shape[1], 0), value=fill) for b in batches]
        out[name] = torch.cat(rows)
    pixels = [b["pixel_values"] for b in batches if "pixel_values" in b]
    return out | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def two_turns(model, policy, first, second, **settings):
    with vlmprune.prune(model, policy):
        tokens, logits, out = generate(model, first, 3, **settings)
        ones = torch.ones_like(tokens)
        ids = torch.cat([first["input_ids"], tokens, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], ones, second["attention_mask"]], 1)
        call = {**second, "input_ids": ids, "attention_mask": mask}
        more = generate(model, call, 3, past_key_values=out.past_key_values)[1]
    return torch.cat([logits, more], 1)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_samples_of_a_batch_do_not_disturb_one_another(model, policy, static):
    first = [make_batch([spec], seed=i) for i, spec in enumerate(FIRST)]
    second = [make_batch([spec], seed=10 + i) for i, spec in enumerate(SECOND)]
    want = torch.cat([two_turns(model, policy, a, b) for a, b in zip(first, second, strict=True)])
    cache = {"past_key_values": StaticCache(config=model.config, max_cache_len=96)} if static else {}
    got = two_turns(model, policy, joined(first), joined(second), **cache)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2vl-video", "qwen3vl", "llava_next"])
def test_a_text_turn_after_images_of_unequal_size(name):
    """With three-dimensional positions the text goes on behind the images' extent, pruned or not."""
    case = CASES[name]
    model = build(case)
    inputs, _ = prompts(case, case.padded)
    more = torch.randint(3, 190, (len(inputs["input_ids"]), 3), generator=torch.Generator().manual_seed(1))
    settings = {"do_sample": False, "return_dict_in_generate": True, "suppress_tokens": [IMAGE, VIDEO]}
    settings |= {"output_logits": True, "max_new_tokens": STEPS}
    with vlmprune.prune(model, vlmprune.FastV(layer=3, keep=0.5)) as run:
        first = model.generate(**inputs, **settings)
        ids = torch.cat([first.sequences, more], 1)
        real = torch.cat([inputs["attention_mask"], ids.new_ones(len(ids), STEPS + 3)], 1)
        turn = {"input_ids": ids, "attention_mask": real, "past_key_values": first.past_key_values}
        got = torch.stack(model.generate(**turn, **settings).logits, 1)
    whole = {**inputs, "input_ids": ids, "attention_mask": real}
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    want = family.oracle(model, whole, family.dropped_from(run, inputs))[1]
    torch.testing.assert_close(got, want, rtol=0, atol=family.TOLERANCE)


@pytest.mark.parametrize("first, then", [((2,), (4,)), ((1, 4), (3,)), ((4,), (0,))], ids=str)
def test_a_turn_in_another_scope_with_other_stages(model, first, then):
    """Its layers hold what the first scope's stages left, wherever its own begin."""
    batch, more = make_batch([[4, "I", 7], [2, "I", 3]]), make_batch([["I", 3], ["I", 3]], seed=3)
    with vlmprune.prune(model, Drawn(first)) as run:
        _, _, out = generate(model, batch, 3)
    dropped = dropped_from(run, batch)
    ids = torch.cat([out.sequences, more["input_ids"]], 1)
    real = torch.ones_like(ids)
    real[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    call = {"input_ids": ids, "attention_mask": real, "pixel_values": more["pixel_values"]}
    with vlmprune.prune(model, Drawn(then)) as run:
        got = generate(model, call, 3, past_key_values=out.past_key_values)[1]
    visual, past = ids == IMAGE, ids.shape[1] - more["input_ids"].shape[1] - 1
    hidden = {}
    for layer in {*dropped, *then}:
        gone = torch.zeros_like(visual)
        if layer in dropped:
            gone[:, : dropped[layer].shape[1]] |= dropped[layer]
        for stage in run.stages:
            if stage.layer == layer:
                kept = torch.zeros_like(visual).scatter_(1, stage.index + past, True)
                gone[:, past:] |= (visual & ~kept)[:, past:]
        hidden[layer] = gone
    order = [0, 2, 1, 3]  # the oracle gets each sample's images together
    whole = torch.cat([batch["pixel_values"], more["pixel_values"]])[order]
    want = oracle(model, call | {"pixel_values": whole}, hidden, 3)[1]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)

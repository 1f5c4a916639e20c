"""The vision tower's own query, key and features reach the methods, each call's its own, in blocks that are tokens."""

from __future__ import annotations

from inspect import signature

import pytest
import torch

import vlmprune
from helpers.families import CASES, build, prompts
from helpers.families_oracle import TOLERANCE, Reader, dropped_from, generate, oracle
from vlmprune.models.host.parts import find_parts, tower_layers
from vlmprune.policies.base import Needs, TokenContext


def attention_of(tower, **inputs):
    """What the tower's own last but one layer attends to, ``[I, H, P, P]``."""
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tower(**inputs, output_attentions=True).attentions[-2]
    tower.set_attn_implementation("sdpa")
    return weights


@pytest.mark.parametrize("name", ["llava-llama", "internvl", "idefics3", "smolvlm"])
def test_vision_attention_is_the_towers_own(name):
    case = CASES[name]
    model = build(case)
    inputs, pictures = prompts(case, case.padded)
    contexts: list[TokenContext] = []
    with vlmprune.prune(model, Reader(contexts.append)):
        generate(model, inputs)
    seen, pixels = contexts[0].vision[-2], torch.cat([p.inputs["pixel_values"] for s in pictures for p in s])
    tower = model.model.vision_model if case.by_sample else model.model.vision_tower
    want = attention_of(tower, pixel_values=pixels)
    got = (seen.query @ seen.key.transpose(2, 3) * seen.scale).softmax(-1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    # the blocks that become one token are those that the model's own pixel shuffle puts together
    patches = torch.arange(16.0).expand(len(pixels), 16)
    if case.by_sample:
        blocks = model.model.connector.pixel_shuffle(patches[..., None], 2)
    elif name == "internvl":
        blocks = model.model.pixel_shuffle(patches.view(-1, 4, 4, 1), 0.5).flatten(1, 2)
    else:
        blocks = patches[..., None]
    torch.testing.assert_close(seen.per_token(patches), blocks.mean(-1))
    rows = want[:, :, :1] if seen.cls else want
    received = rows.mean((1, 2))[:, int(seen.cls) :]
    torch.testing.assert_close(seen.received(), seen.per_token(received), atol=1e-5, rtol=1e-4)
    features = contexts[0].features
    assert features.shape[:2] == (len(pixels), blocks.shape[1])


def layer_of(model, layer):
    """The attention of a block of a model's vision tower, and the projection behind it."""
    parts = find_parts(model)
    attn = getattr(tower_layers(parts)[layer], parts.tower.attention)
    found = [name for name, _ in attn.named_children() if name in ("out_proj", "proj", "projection_layer")]
    (name,) = found
    return getattr(attn, name)


@pytest.mark.parametrize("layer", [0, -2])
@pytest.mark.parametrize(
    "name", [name for name in CASES if not name.startswith("llava-") or name == "llava-llama"]
)
def test_values_are_the_towers_own(name, layer):
    """Of every tower: weighed by the attention of query and key they are what its layer projects."""
    case = CASES[name]
    model = build(case)
    inputs, _ = prompts(case, [case.one])
    contexts: list[TokenContext] = []
    told: list[torch.Tensor] = []
    with (
        vlmprune.prune(model, Reader(contexts.append, Needs(vision=(layer,), values=True))),
        layer_of(model, layer).register_forward_pre_hook(lambda _, args: told.append(args[0].detach())),
    ):
        generate(model, inputs)
    seen = contexts[0].vision[layer]
    logits = seen.query @ seen.key.transpose(2, 3) * seen.scale
    if seen.mask is not None:
        logits = logits.masked_fill(~seen.mask[:, None, None], float("-inf"))
    made = (logits.softmax(-1) @ seen.value).transpose(1, 2).flatten(2)
    made = made.flatten(0, 1) if seen.mask is None else made[seen.mask]
    want = torch.cat([x.reshape(-1, x.shape[-1]) for x in told])
    torch.testing.assert_close(made, want, atol=1e-5, rtol=1e-4)


def test_values_are_not_read_where_nobody_asks():
    case = CASES["llava-llama"]
    model = build(case)
    contexts: list[TokenContext] = []
    with vlmprune.prune(model, Reader(contexts.append)):
        generate(model, prompts(case, [case.one])[0])
    assert contexts[0].vision[-2].value is None
    with pytest.raises(ValueError, match=r"^values: expected False without vision layers, got True$"):
        Needs(values=True)


def test_padded_patches_of_a_tower_neither_attend_nor_count():
    """Idefics3's images may be padded with pixels that its tower masks."""
    case = CASES["idefics3"]
    model = build(case)
    inputs, _ = prompts(case, [case.one])
    inputs["pixel_attention_mask"] = torch.ones(1, 1, 16, 16).long()
    inputs["pixel_attention_mask"][..., 8:] = 0
    contexts: list[TokenContext] = []
    with vlmprune.prune(model, Reader(contexts.append)):
        generate(model, inputs)
    seen = contexts[0].vision[-2]
    real = torch.tensor([[True, True, False, False]] * 4)
    assert torch.equal(seen.mask, real.view(1, 16))
    want = attention_of(
        model.model.vision_model, pixel_values=inputs["pixel_values"][0], patch_attention_mask=real[None]
    )
    rows = want[:, :, real.view(-1)].mean((1, 2))
    torch.testing.assert_close(seen.received(), seen.per_token(rows), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava-llama", "internvl", "idefics3"])
def test_images_encoded_ahead_are_not_mixed_up(name):
    """Other images go through the tower between a prompt's images and its prefill; beams repeat samples, not images."""
    case = CASES[name]
    model = build(case)
    first, _ = prompts(case, case.padded, seed=1)
    other, _ = prompts(case, case.padded, seed=2)
    calm: list[TokenContext] = []
    with vlmprune.prune(model, Reader(calm.append)):
        generate(model, first)
    busy: list[TokenContext] = []
    with torch.no_grad(), vlmprune.prune(model, Reader(busy.append)):
        handle = model.model.register_forward_pre_hook(
            lambda *_: model.get_image_features(other["pixel_values"]) and None
        )
        generate(model, first)
        handle.remove()
        generate(model, first, num_beams=2)
    assert torch.equal(calm[0].vision[-2].key, busy[0].vision[-2].key)
    assert torch.equal(calm[0].features, busy[0].features)
    if (
        "mm_encoder_outputs" in signature(model.forward).parameters
    ):  # else pixels are repeated, and encoded again
        images = [0, 1, 0, 1, 2, 2]
        torch.testing.assert_close(busy[1].features, calm[0].features[images])
        torch.testing.assert_close(busy[1].vision[-2].key, calm[0].vision[-2].key[images])


BEFORE = {
    "fastervlm": vlmprune.FasterVLM(keep=2, positions="keep"),
    "vispruner": vlmprune.VisPruner(keep=2, positions="keep"),
    "visionzip": vlmprune.VisionZip(dominant=1, contextual=1, positions="pack"),
    "accm_selection": vlmprune.ACCMSelection(keep=2, positions="keep"),
    "vscan": vlmprune.VScan(keep=3, then=2, layer=3, window=1, shallow_layer=0, positions="pack"),
}


@pytest.mark.parametrize("policy", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_methods_before_the_decoder_where_a_token_is_a_block_of_patches(name, policy):
    case = CASES[name]
    model = build(case)
    inputs, pictures = prompts(case, case.padded)
    with vlmprune.prune(model, policy) as run:
        _, logits = generate(model, inputs)
    assert [len(run.kept(b)) for b in range(len(pictures))] == [2 * len(sample) for sample in pictures]
    if policy in (
        BEFORE["fastervlm"],
        BEFORE["vispruner"],
        BEFORE["accm_selection"],
    ):  # the others merge or pack, which the oracle cannot
        want = oracle(model, inputs, dropped_from(run, inputs))[1]
        torch.testing.assert_close(logits, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_what_others_put_before_the_encoding_of_images_is_called_and_stays(name):
    model, (inputs, _) = build(CASES[name]), prompts(CASES[name], [CASES[name].one])
    usual, calls = model.model.get_image_features, []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return usual(*args, **kwargs)

    vars(model.model)["get_image_features"] = counted
    with torch.no_grad(), vlmprune.prune(model, vlmprune.FastV(layer=2, keep=0.5)) as run:
        model(**inputs)
    assert len(calls) == 1 and run.stages[0].tokens_kept < run.stages[0].tokens_in
    assert vars(model.model)["get_image_features"] is counted
    vlmprune.attach(model, vlmprune.FastV(layer=2, keep=0.5))
    vars(model.model)["get_image_features"] = usual
    vlmprune.detach(model)
    assert vars(model.model)["get_image_features"] is usual

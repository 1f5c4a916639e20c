"""Everything that docs/families.md says is refused, one test a row: the message is the one that stands there."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.generation.continuous_batching import PagedAttentionCache

import vlmprune
from helpers.caches import rounded_cache
from helpers.families import CASES, DECODERS, IMAGE, LAYERS, TOWER, build, prompts
from helpers.table import Back
from helpers.tiny import BEFORE_PREFILL
from helpers.words import make_tokenizer
from vlmprune.errors import InputError, ModelError, NotPrunedError
from vlmprune.models import check_config

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
FASTV = vlmprune.FastV(layer=3)
UNEQUAL = ("llava_next", "llava_onevision", "qwen2vl", "qwen2_5_vl", "qwen3vl")
QWENS = ("qwen2vl", "qwen2_5_vl", "qwen3vl")


MADE: list[torch.nn.Module] = []


def made(name):
    """A family's model, which is looked at again when the call was refused."""
    MADE[:] = [build(CASES[name])]
    return MADE[0]


def rows():
    """Families, methods and situation of each row of the page, and the message that it quotes."""
    lines = [
        line.strip("|\n ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")
    ]
    return {" - ".join(line[:3]).replace("`", ""): line[4].strip("`") for line in lines[2:]}


def call(name, policy):
    """One forward of a family, pruned."""
    case = CASES[name]
    model, (inputs, _) = made(name), prompts(case, [case.one])
    with torch.no_grad(), vlmprune.prune(model, policy):
        model(**inputs)


def chunks(name, policy):
    case = CASES[name]
    model, (inputs, _) = made(name), prompts(case, [case.one])
    with vlmprune.prune(model, policy):
        model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=4)


def encoded_outside(name, policy):
    case = CASES[name]
    model, (inputs, _) = made(name), prompts(case, [case.one])
    names = {"pixel_values", "image_sizes", "batch_num_images", "image_grid_thw"} & {*inputs}
    with torch.no_grad():
        given = model.get_image_features(**{n: inputs[n] for n in names}, return_dict=True)
        inputs = {n: x for n, x in inputs.items() if n not in names - {"image_grid_thw"}}
        with vlmprune.prune(model, policy):
            model(**inputs, mm_encoder_outputs={"image": given})


def accm():
    return vlmprune.ACCM(
        selection=vlmprune.Uniform(layer=0, keep=3),
        compensator=lambda images, k: ["w20"] * len(images),
        keep=None,
        wording="w60 {}",
        tokenizer=make_tokenizer(),
    )


def sliding():
    text = DECODERS["qwen2"]()
    text.layer_types, text.sliding_window = ["full_attention", "sliding_attention"], 8
    vision = hf.CLIPVisionConfig(**TOWER)
    check_config(hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))


def compact_quantized():
    with pytest.MonkeyPatch.context() as patch:
        model = made("llava-llama")
        cache = rounded_cache(patch, model.config, LAYERS)
        call_llava(vlmprune.FastV(layer=2, earlier_kv="compact"), model, past_key_values=cache)


def call_llava(policy, model=None, specs=((4, "I", 7),), pad="left", without=(), **settings):
    """One forward of the first family: a batch without some of its inputs, and with some settings."""
    case = CASES["llava-llama"]
    model = made("llava-llama") if model is None else model
    inputs, _ = prompts(case, [["wide" if part == "I" else part for part in spec] for spec in specs])
    if pad == "right":
        shift = (inputs["attention_mask"] == 0).sum(1)
        for name in ("input_ids", "attention_mask"):
            rolled = [row.roll(-int(n)) for row, n in zip(inputs[name], shift, strict=True)]
            inputs[name] = torch.stack(rolled)
    if "inputs_embeds" in settings:
        settings["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    inputs = {name: x for name, x in inputs.items() if name not in {*without, *settings}}
    with torch.no_grad(), vlmprune.prune(model, policy):
        return model(**inputs, **settings)


def strange_cache():
    class Strange(hf.cache_utils.DynamicLayer):
        pass

    cache = hf.DynamicCache(config=CASES["llava-llama"].config())
    cache.layers = [Strange() for _ in range(LAYERS)]
    call_llava(FASTV, past_key_values=cache)


def pruned_cache_elsewhere():
    model = made("llava-llama")
    cache = hf.DynamicCache(config=model.config)
    call_llava(vlmprune.FasterVLM(keep=2, positions="pack"), model, past_key_values=cache)
    model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)


def continuous():
    model = made("llava-llama")
    with torch.no_grad(), vlmprune.prune(model, FASTV):
        model(input_ids=torch.tensor([[1, 5, 6]]), cache=object.__new__(PagedAttentionCache))


def packed():
    where = torch.cat([torch.arange(12), torch.arange(16)])[None]
    call_llava(FASTV, position_ids=where, use_cache=False, without=("attention_mask",))


def rectified_flash():
    model = made("llava-llama")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    vlmprune.attach(model, vlmprune.FastV(layer=3, rectify=True))


def reentrant_checkpoints():
    case = CASES["qwen3vl"]
    model, (inputs, _) = made("qwen3vl"), prompts(case, [case.one])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with vlmprune.prune(model, vlmprune.Random(layer=0)):
        model(**inputs, use_cache=False)


def checkpoints_of_the_scattered():
    model, (inputs, _) = made("llava-llama"), prompts(CASES["llava-llama"], [CASES["llava-llama"].one])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with vlmprune.prune(model, CSP):
        model(**inputs, use_cache=False)


def flash_waves():
    model = made("llava-llama")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    vlmprune.attach(model, SCOUT)


def rectified_turn():
    model = made("llava-llama")
    cache = hf.DynamicCache(config=model.config)
    call_llava(vlmprune.FastV(layer=1, keep=2, rectify=True), model, past_key_values=cache)
    mask = torch.ones(1, cache.get_seq_length() + 28, dtype=torch.int64)
    call_llava(SCOUT, model, past_key_values=cache, attention_mask=mask)


def no_hooks_in_the_tower():
    """As where torch.compile has compiled it before the scope; compiling takes too long here."""
    model = made("llava-llama")
    inputs, _ = prompts(CASES["llava-llama"], [CASES["llava-llama"].one])
    with torch.no_grad(), vlmprune.prune(model, FASTV):
        model.model.vision_tower._forward_hooks.clear()
        model(**inputs)


TOWERS = vlmprune.FasterVLM(keep=2, positions="keep")
TEXT = vlmprune.SparseVLM(layers=(3, 4), keep=(3, 2), positions="pack")
SCOUT = vlmprune.Scout(coarse=vlmprune.Uniform(layer=0, keep=3), fine=2, look=2)
CSP = vlmprune.LVLMCSP(cluster=2, then=2, scatter=2, prune=3)
EACH = vlmprune.FastV(layer=3, keep=2, spend="image")
PACK = vlmprune.FasterVLM(keep=2, positions="pack")
EXISTS = "mm_encoder_outputs" in signature(hf.LlavaNextModel.forward).parameters
AHEAD = pytest.mark.skipif(not EXISTS, reason="transformers < 5.18 takes no features made ahead")
CHUNKS = pytest.mark.skipif(not BEFORE_PREFILL, reason="transformers < 5.18 loses a chunked prefill's images")
CHECKPOINTED = pytest.mark.real("torch.utils.checkpoint asks for its random state")

# In the order of the page: what is done, once for each family it is said of.
DONE = [
    (lambda name: check_config(getattr(hf, name)()), ("Gemma3Config", "Gemma3nConfig"), ()),
    (lambda _: check_config(hf.PaliGemmaConfig()), ("paligemma",), ()),
    (lambda _: check_config(hf.MllamaConfig()), ("mllama",), ()),
    (lambda _: check_config(hf.AyaVisionConfig()), ("aya_vision",), ()),
    (lambda _: sliding(), ("llava",), ()),
    (lambda name: call(name, PACK), QWENS, ()),
    (lambda name: call(name, accm()), QWENS, ()),
    (lambda name: encoded_outside(name, FASTV), UNEQUAL, AHEAD),
    (lambda name: encoded_outside(name, TOWERS), ("llava-llama", "internvl", "idefics3", "smolvlm"), AHEAD),
    (lambda name: chunks(name, FASTV), UNEQUAL, CHUNKS),
    (lambda name: chunks(name, TOWERS), ("llava-llama", "internvl", "idefics3", "smolvlm"), CHUNKS),
    (lambda name: chunks(name, vlmprune.AIM(layer=2, stages=2, positions="pack")), ("llava-llama",), CHUNKS),
    (lambda name: chunks(name, TEXT), ("llava-llama", "llava_next"), CHUNKS),
    (lambda name: call(name, vlmprune.Stages([TOWERS, EACH])), ("llava_next", "qwen2vl"), ()),
    (lambda _: compact_quantized(), ("llava",), ()),
    (lambda _: strange_cache(), ("llava",), ()),
    (lambda _: pruned_cache_elsewhere(), ("llava",), ()),
    (lambda _: continuous(), ("llava",), ()),
    (lambda _: packed(), ("llava",), ()),
    (
        lambda _: call_llava(FASTV, specs=((4, "I", 7), ("I", 2)), pad="right", logits_to_keep=1),
        ("llava",),
        (),
    ),
    (lambda _: call_llava(FASTV, attention_mask=torch.ones(1, 1, 28, 28)), ("llava",), ()),
    (lambda _: call_llava(FASTV, without=("input_ids", "pixel_values"), inputs_embeds=()), ("llava",), ()),
    (lambda _: call_llava(accm(), without=("input_ids",), inputs_embeds=()), ("llava",), ()),
    (lambda _: rectified_flash(), ("llava",), ()),
    (lambda _: reentrant_checkpoints(), ("qwen3vl",), CHECKPOINTED),
    (lambda _: vlmprune.attach(made("llava-llama"), replace(CSP, earlier_kv="compact")), ("llava",), ()),
    (lambda _: checkpoints_of_the_scattered(), ("llava",), CHECKPOINTED),
    (lambda name: call(name, vlmprune.Stages([replace(accm(), keep=None), Back()])), ("llava-llama",), ()),
    (lambda _: flash_waves(), ("llava",), ()),
    (lambda name: call(name, vlmprune.Stages([SCOUT, vlmprune.Random(layer=1)])), ("llava-llama",), ()),
    (lambda _: vlmprune.attach(made("llava-llama"), replace(SCOUT, rectify=True)), ("llava",), ()),
    (lambda _: rectified_turn(), ("llava",), ()),
    (lambda _: no_hooks_in_the_tower(), ("llava",), ()),
]


@pytest.mark.parametrize(
    "do, name, row",
    [
        pytest.param(do, name, row, id=f"{number}-{name}", marks=marks)
        for number, (row, (do, names, marks)) in enumerate(zip(rows().items(), DONE, strict=True), 1)
        for name in names
    ],
)
def test_what_the_page_says_is_refused(do, name, row):
    MADE.clear()
    with pytest.raises((ModelError, NotPrunedError, InputError)) as refused:
        do(name)
    said = str(refused.value)
    del refused  # its traceback keeps the hooks of torch.utils.checkpoint on their stack, until it is gone
    assert row[1] in said
    left = [module for model in MADE for module in model.modules() if module._forward_pre_hooks]
    assert not left and not any("get_image_features" in vars(model.model) for model in MADE)

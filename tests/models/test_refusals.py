"""What cannot be pruned is refused with one sentence that says why, and leaves no hook behind."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature

import pytest
import torch
import transformers as hf
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vlmprune
from helpers.families import CASES, DECODERS, IMAGE, TOWER, build, llava, prompts
from vlmprune.errors import ModelError, VersionError
from vlmprune.models import check_config
from vlmprune.models.host import versions
from vlmprune.models.host.families import FAMILIES
from vlmprune.policies.base import PruningPolicy, Reduction, TokenContext

FASTV = vlmprune.FastV(layer=3)


def hooks(model):
    modules = list(model.modules())
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)


def altered(**changes):
    """A LLaVA configuration with some of its text or other settings changed."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER), text_config=DECODERS["qwen2"](), image_token_index=IMAGE
    )
    for name, value in changes.items():
        owner, _, last = name.rpartition("__")
        setattr(getattr(config, owner) if owner else config, last, value)
    return config


siglip = hf.SiglipVisionConfig(**TOWER)
CONFIGS = {
    "gemma3": (hf.Gemma3Config, r"^model: 'gemma3' cannot be pruned: image tokens attend in both directions"),
    "paligemma": (hf.PaliGemmaConfig, r"^model: 'paligemma' cannot be pruned: the whole prompt attends"),
    "mllama": (hf.MllamaConfig, r"^model: 'mllama' cannot be pruned: images enter through cross-attention"),
    "text-only": (
        hf.Qwen3Config,
        r"^model: expected a vision-language model of type .*, got 'qwen3'$",
    ),
    "unknown-family": (
        hf.AyaVisionConfig,
        rf"^model: expected a vision-language model of type {', '.join(FAMILIES)}, got 'aya_vision'$",
    ),
    "sliding-layers": (
        lambda: altered(
            text_config__layer_types=["full_attention", "sliding_attention"], text_config__sliding_window=8
        ),
        r"^decoder: expected full attention in every layer, got layers of sliding_attention: ",
    ),
    "hybrid": (
        lambda: altered(text_config__layer_types=["full_attention", "linear_attention"]),
        r"^decoder: expected full attention in every layer, got layers of linear_attention: ",
    ),
    "decoder": (
        lambda: altered(text_config=hf.Gemma2Config()),
        r"^decoder: expected one of llama, mistral, qwen2, qwen3, got 'gemma2'$",
    ),
    "tower": (
        lambda: altered(vision_config=hf.PixtralVisionConfig()),
        r"^vision tower: expected one of clip_vision_model, siglip_vision_model, got 'pixtral'$",
    ),
    "cls-as-patch": (
        lambda: altered(vision_feature_select_strategy="full"),
        r"^vision_feature_select_strategy: expected 'default' with clip_vision_model, got 'full' \(its CLS row would",
    ),
    "patch-as-cls": (
        lambda: altered(vision_config=siglip),
        r"^vision_feature_select_strategy: expected 'full' with siglip_vision_model, got 'default' \(it would lose a",
    ),
}


@pytest.mark.parametrize("make, message", CONFIGS.values(), ids=CONFIGS)
def test_configurations(make, message):
    with pytest.raises(ModelError, match=message):
        check_config(make())


@pytest.fixture(scope="module")
def qwen3vl():
    return build(CASES["qwen3vl"])


@dataclass(frozen=True)
class Packed(PruningPolicy):
    """Asks for positions without gaps."""

    @property
    def layers(self):
        return (2,)

    def select(self, ctx: TokenContext):
        return Reduction(ctx.ordinals[:, :2], positions="pack")


def test_packed_positions_with_three_dimensions(qwen3vl):
    inputs, _ = prompts(CASES["qwen3vl"], [CASES["qwen3vl"].one])
    message = r"^positions: expected 'keep' with 'qwen3_vl' .* got 'pack' from Packed\("
    with torch.no_grad(), vlmprune.prune(qwen3vl, Packed()), pytest.raises(ModelError, match=message):
        qwen3vl(**inputs)


@pytest.mark.skipif(
    "mm_encoder_outputs" not in signature(hf.LlavaNextModel.forward).parameters,
    reason="transformers < 5.18 takes no features made ahead",
)
def test_features_of_unequal_images_made_outside_the_scope():
    case = CASES["llava_next"]
    model = build(case)
    inputs, _ = prompts(case, [case.one])
    made = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_sizes"), return_dict=True)
    message = r"^image: expected features that this model encoded inside the scope .* got others$"
    with torch.no_grad(), vlmprune.prune(model, FASTV), pytest.raises(ModelError, match=message):
        model(**inputs, mm_encoder_outputs={"image": made})
    with torch.no_grad(), vlmprune.prune(model, FASTV), pytest.raises(ModelError, match=r"in chunks$"):
        cut = BaseModelOutputWithPooling(pooler_output=[torch.cat(list(made.pooler_output))])
        model(**inputs, mm_encoder_outputs={"image": cut})


def test_continuous_batching():
    """Its steps come without images and with a cache of pages; its loop swallows errors, so leaving the scope raises."""
    model = llava()
    pages = object.__new__(PagedAttentionCache)
    message = "continuous batching cannot be pruned"
    with torch.no_grad(), vlmprune.prune(model, FASTV):
        with pytest.raises(ModelError, match=rf"^cache: {message} \(use generate\)$"):
            model(input_ids=torch.tensor([[1, 5, 6]]), cache=pages)
    assert hooks(model) == 0


VERSIONS = {
    "old-transformers": (
        "transformers",
        "5.16.3",
        r"^transformers: expected transformers>=5\.17,<6\.0, got 5\.16\.3$",
    ),
    "new-transformers": (
        "transformers",
        "6.0.0",
        r"^transformers: expected transformers>=5\.17,<6\.0, got 6\.0\.0$",
    ),
    "old-torch": ("torch", "2.9.1+cu130", r"^torch: expected torch>=2\.11, got 2\.9\.1\+cu130$"),
    "old-triton": ("triton", "3.5.0", r"^triton: expected triton>=3\.6, got 3\.5\.0$"),
}


@pytest.mark.parametrize("name, got, message", VERSIONS.values(), ids=VERSIONS)
def test_versions_outside_the_range(monkeypatch, name, got, message):
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda other: got if other == name else real(other))
    with pytest.raises(VersionError, match=message):
        versions.check_versions()


def test_versions_inside_the_range_and_a_missing_triton(monkeypatch):
    def version(name):
        if name == "triton":
            raise versions.PackageNotFoundError
        return {"torch": "2.11.0a0+git1", "transformers": "5.17.0.dev0"}[name]

    versions.check_versions()
    monkeypatch.setattr(versions, "version", version)
    versions.check_versions()

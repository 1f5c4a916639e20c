"""Configurations and versions that are refused, with one sentence that says why."""

from __future__ import annotations

import pytest
import transformers as hf

from helpers.families import DECODERS, IMAGE, TOWER
from vlmprune.errors import ModelError, VersionError
from vlmprune.models import check_config
from vlmprune.models.host import versions
from vlmprune.models.host.families import FAMILIES


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

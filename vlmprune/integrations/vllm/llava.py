"""The LLaVA family in vLLM: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision (images; its videos stay whole)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmprune.integrations.vllm.images import PrunedImages
from vlmprune.integrations.vllm.prompts import PrunedPrompt
from vlmprune.models.host.views import Encoded

TOWER_PARTS = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm", "head")
FLAT_TOWER = WeightsMapper(
    orig_to_new_prefix={f"vision_tower.{p}.": f"vision_tower.vision_model.{p}." for p in TOWER_PARTS}
)
"""transformers 5 saves a vision tower without ``vision_model`` in its names; behind vLLM's own renaming."""


class BySize(PrunedPrompt):
    """Images whose size in pixels says how many visual tokens they have."""

    info: Any

    def image_tokens(self, images: Any, made: Mapping[str, Any]) -> list[int]:
        """As vLLM counts them."""
        sizes = [images.get_image_size(i) for i in range(len(images))]
        return [
            self.info.get_num_image_tokens(image_width=size.width, image_height=size.height) for size in sizes
        ]


class LlavaParts(PrunedImages):
    """Where these models have their parts."""

    vision_tower: Any
    multi_modal_projector: Any

    def vision_parts(self) -> tuple[Sequence[Any], Any]:
        """The tower's blocks, and the projector."""
        return self.vision_tower.vision_model.encoder.layers, self.multi_modal_projector


class Tiled(LlavaParts):
    """Images cut into tiles; where several come in one request, their tiles are padded to the most."""

    def sizes(self, kwargs: dict[str, Any]) -> list[int]:
        """The tiles of every image, and padding."""
        return [len(tiles) for tiles in kwargs["pixel_values"]]

    def describe(self, note: Encoded, kwargs: dict[str, Any]) -> None:
        """Note the sizes in pixels."""
        note.sizes = tuple((h, w) for h, w in kwargs["image_sizes"].tolist())


class LlavaPrompt(BySize, LlavaMultiModalProcessor):
    """LLaVA-1.5's."""


class LlavaNextPrompt(BySize, LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's."""


class LlavaOnevisionPrompt(BySize, LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaPrompt, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class Llava(LlavaParts, LlavaForConditionalGeneration):
    """LLaVA-1.5, and its relatives of one square crop."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | FLAT_TOWER

    def sizes(self, kwargs: dict[str, Any]) -> list[int]:
        """Every image is one crop."""
        return [1] * len(kwargs["pixel_values"])


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextPrompt, info=LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaNext(Tiled, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | FLAT_TOWER


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionPrompt, info=LlavaOnevisionProcessingInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class LlavaOnevision(Tiled, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | FLAT_TOWER

    def describe(self, note: Encoded, kwargs: dict[str, Any]) -> None:
        """With the most tiles' worth of tokens that vLLM gives an image."""
        super().describe(note, kwargs)
        note.ratio = "anyres_max_9"

"""Qwen2.5-VL and Qwen3-VL in vLLM: images, whose tokens keep the positions of three dimensions that they had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vlmprune.integrations.vllm.images import PrunedImages, starts
from vlmprune.integrations.vllm.prompts import PrunedPrompt
from vlmprune.integrations.vllm.settings import Settings
from vlmprune.models.host.views import Encoded


class ImagesOnly:
    """Stands before what vLLM knows of these models: no videos, which its own pruning would have to shorten."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Tokens of the largest image that may stay."""
        info: Any = self
        return {"image": Settings.of(info.get_hf_config()).most(info.get_max_image_tokens())}


class ByGrid(PrunedPrompt):
    """Images whose grid of patches says how many visual tokens they have."""

    info: Any

    def image_tokens(self, images: Any, made: Mapping[str, Any]) -> list[int]:
        """Blocks of patches, each of which is a token."""
        block = self.info.get_hf_config().vision_config.spatial_merge_size ** 2
        return [int(n) // block for n in made["image_grid_thw"].prod(-1)]


class Rotated(PrunedImages):
    """Positions of three dimensions: text stands where it would behind whole images, kept tokens where they were.

    Which tokens stay is known once the tower has run. So vLLM's own recomputation is used, which it has for pruned videos:
    the model hands the positions within the image on as the last columns of its tokens, and the runner brings them here.
    """

    attention = "attn"
    columns: int
    """How many the model appends: frame, row and column first."""
    visual: Any

    def vision_parts(self) -> tuple[Sequence[Any], Any]:
        """The tower's blocks, and the merger."""
        return self.visual.blocks, self.visual.merger

    def noted(self, note: Encoded, kwargs: dict[str, Any]) -> list[int]:
        """Note the grids of the images."""
        note.thw = kwargs["image_grid_thw"].tolist()
        return starts([t * h * w for t, h, w in note.thw])

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Positions ``[3, N]``, final for text; an image's tokens are all given its first one, until they are known."""
        side = self.config.vision_config.spatial_merge_size
        parts: list[Tensor] = []
        done = position = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = feature.mm_position
            begin = position + place.offset - done
            parts += [torch.arange(position, begin), torch.full((place.length,), begin)]
            position = begin + max(feature.data["image_grid_thw"].data[1:].tolist()) // side
            done = place.offset + place.length
        end = position + len(input_tokens) - done
        parts.append(torch.arange(position, end))
        return torch.cat(parts).expand(3, -1).contiguous(), end - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Put the image tokens from ``num_computed_tokens`` on, whose rows these are, where they were in their images.

        Returns:
            The rows without their last columns, positions ``[3, N]``, and by how much the next one is beyond N.
        """
        device, N = mrope_positions.device, mrope_positions.shape[1]
        rows = [embeds[:, : -self.columns] for embeds in multimodal_embeddings]
        inside = [embeds[:, -self.columns :][:, :3].long() for embeds in multimodal_embeddings]
        positions = mrope_positions
        if inside:
            within = torch.cat(inside).T.to(device)
            ids = torch.as_tensor(input_ids, device=device)
            image, order = ids == self.config.image_token_id, torch.arange(N, device=device)
            fresh = image & (order >= num_computed_tokens)
            number = fresh.cumsum(0) - 1
            mine = fresh & (number < within.shape[1])
            text = torch.where(image, -1, order).cummax(0).values  # the last token of text before each
            first = torch.where(text < 0, 0, positions[:, text.clamp(min=0)] + 1)
            moved = first + within[:, number.clamp(0, within.shape[1] - 1)]
            positions = torch.where(mine, moved, positions)
        with gpu_sync_allowed():
            return rows, positions, int(positions.max()) + 1 - N


class Qwen25VLInfo(ImagesOnly, Qwen2_5_VLProcessingInfo):
    """Qwen2.5-VL's."""


class Qwen25VLPrompt(ByGrid, Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's."""


class Qwen3VLInfo(ImagesOnly, Qwen3VLProcessingInfo):
    """Qwen3-VL's."""


class Qwen3VLPrompt(ByGrid, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLPrompt, info=Qwen25VLInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class Qwen25VL(Rotated, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""

    columns = 4


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLPrompt, info=Qwen3VLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen3VL(Rotated, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: the features of its tower's inner layers come along, and get shorter with the rows."""

    columns = 5

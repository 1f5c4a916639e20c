"""Qwen2.5-VL and Qwen3-VL in vLLM: images, whose tokens keep the positions of three dimensions that they had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
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

from vlmprune.errors import check
from vlmprune.integrations.vllm.images import PrunedImages
from vlmprune.integrations.vllm.positions import COLUMNS, Placed, cells_of, laid_out, put_back, within_image
from vlmprune.integrations.vllm.prompts import PrunedPrompt
from vlmprune.integrations.vllm.settings import KEPT, Settings
from vlmprune.models.host.views import Encoded

ANGLES = 4
"""vLLM prepares the angles of so many times ``max_position_embeddings`` positions, where its own pruning is on."""


class ImagesOnly:
    """Stands before what vLLM knows of these models: no videos, which its own pruning would have to shorten."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images, no video."""
        return {"image": None, "video": 0}

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

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The largest image, and text behind it."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.prompt = [*inputs.prompt, self.info.get_hf_config().vision_end_token_id]
        return inputs

    def check_prompt(self, made: Any) -> None:
        """Refuse a prompt without text behind its last image: from its last position the answer's are counted."""
        after = [place.offset + place.length for place in made["mm_placeholders"].get("image", ())]
        text = max(after, default=0) < len(made["prompt_token_ids"])
        check(text, "prompt", "text behind its last image, such as <|vision_end|>", "an image at its end")

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        made: Any = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if KEPT in made:
            config, spare = self.info.get_hf_config(), self._spare()
            for grid, kept in zip(made["image_grid_thw"].tolist(), made[KEPT].tolist(), strict=True):
                side, most = max(grid[1:]) // config.vision_config.spatial_merge_size, kept + spare
                room = f"at most {most} visual tokens a side (keep + {spare}; a lower limit_mm_per_prompt allows more)"
                check(side <= most, "image", room, side)
        return made

    def _spare(self) -> int:
        """How many positions more than tokens any image of a prompt may take, that all are among those vLLM has angles for."""
        length = self.info.ctx.model_config.max_model_len
        angles = ANGLES * self.info.get_hf_config().text_config.max_position_embeddings
        return int((angles - length) // self.info.allowed_mm_limits["image"])


class Rotated(PrunedImages):
    """Positions of three dimensions, as positions.py has them.

    vLLM's own recomputation is used, which it has for pruned videos: the model hands on where in the image a token was
    as the last columns of its row, and the runner brings them back here before the language model sees them.
    """

    attention = "attn"
    visual: Any

    def vision_parts(self) -> tuple[Sequence[Any], Any]:
        """The tower's blocks, and the merger."""
        return self.visual.blocks, self.visual.merger

    def sizes(self, kwargs: dict[str, Any]) -> list[int]:
        """The patches of every image."""
        found: list[int] = kwargs["image_grid_thw"].prod(-1).tolist()
        return found

    def describe(self, note: Encoded, kwargs: dict[str, Any]) -> None:
        """Note the grids."""
        note.thw = kwargs["image_grid_thw"].tolist()

    def cut(self, kwargs: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        """Their patches lie one behind the other."""
        pixels = dict(kwargs)
        ends = [0, *accumulate(self.sizes(kwargs))]
        patches = pixels.pop("pixel_values")[ends[first] : ends[last]]
        return {**super().cut(pixels, first, last), "pixel_values": patches}

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: Sequence[Tensor], image_input: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Append our columns; vLLM's own are exact up to 256 cells a side in bfloat16, and of other counts by model."""
        side = self.config.vision_config.spatial_merge_size
        grids = image_input["image_grid_thw"].tolist()
        return tuple(
            torch.cat([embeds, cells_of(rows // side, columns // side, embeds.device).to(embeds)], 1)
            for embeds, (_, rows, columns) in zip(image_embeds_split, grids, strict=True)
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: Sequence[Any]
    ) -> tuple[Tensor, int]:
        """Positions ``[3, N]`` until the tower has run, and by how much the next one is beyond N."""
        side = self.config.vision_config.spatial_merge_size
        images = [
            Placed(
                feature.mm_position.offset,
                feature.mm_position.length,
                max(feature.data["image_grid_thw"].data[1:].tolist()) // side,
            )
            for feature in mm_features
        ]
        positions, after = laid_out(len(input_tokens), sorted(images))
        return positions, after - len(input_tokens)

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
        rows = [embeds[:, :-COLUMNS] for embeds in multimodal_embeddings]
        positions = mrope_positions
        with gpu_sync_allowed():
            if multimodal_embeddings:
                columns = torch.cat([embeds[:, -COLUMNS:] for embeds in multimodal_embeddings])
                ids = torch.as_tensor(input_ids, device=positions.device)
                within = within_image(columns.to(positions.device))
                positions = put_back(
                    positions, ids == self.config.image_token_id, num_computed_tokens, within
                )
            # a prompt ends with text, so its last position is the largest
            return rows, positions, int(positions[0, -1]) + 1 - positions.shape[1]


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


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLPrompt, info=Qwen3VLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen3VL(Rotated, Qwen3VLForConditionalGeneration):
    """Qwen3-VL: the features of its tower's inner layers come along, and get shorter with the rows."""

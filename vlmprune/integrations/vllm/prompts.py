"""The prompt side: as many placeholder tokens as will stay, which is what scheduler, caches and usage count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from reprlib import repr as short
from typing import Any

import torch
from vllm.exceptions import VLLMClientError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, ImageEmbeddingItems

from vlmprune.errors import InputError, check
from vlmprune.integrations.vllm.settings import ASKED, KEPT, MOST, OVERRIDE, Settings


class RequestError(InputError, VLLMClientError):
    """What a request got wrong. vLLM hands its own errors on as they are; of others its asynchronous engine loses the text."""


class PrunedPrompt:
    """Stands before a multi-modal processor of vLLM: shortens the placeholders of images and notes their counts."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)  # type: ignore[call-arg]
        self.pruning = Settings.of(info.get_hf_config())

    def image_tokens(self, images: Any, made: Mapping[str, Any]) -> list[int]:
        """Visual tokens of every image before pruning, from the pictures or from what the processor made of them."""
        raise NotImplementedError

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """The largest image, with the largest budget that a request may ask for."""
        inputs: Any = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, ASKED: MOST}
        return inputs

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """A request's prompt and images, processed."""
        try:
            made = super().apply(inputs, timing_ctx)  # type: ignore[misc]
            self.check_prompt(made)
        except InputError as error:
            raise RequestError(str(error)) from error
        return made

    def check_prompt(self, made: Any) -> None:
        """Raise InputError for a processed prompt that cannot be served."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        _check_names(hf_kwargs)
        made: Any = super()._apply_hf_processor_main(mm_items, _without(hf_kwargs))  # type: ignore[misc]
        if mm_items.get_count("image", strict=False):
            made[KEPT] = torch.tensor(self._kept(mm_items["image"], made, hf_kwargs.get(ASKED)))
        return made

    def _kept(self, images: Any, made: Mapping[str, Any], asked: Any) -> list[int]:
        """How many tokens of every image stay."""
        ready = isinstance(images, ImageEmbeddingItems | DictEmbeddingItems)
        check(not ready, "image", "a picture (embeddings show nothing to choose by)", "embeddings")
        return [self.pruning.kept(tokens, asked) for tokens in self.image_tokens(images, made)]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        fields: Any = super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs))  # type: ignore[misc]
        return {**fields, KEPT: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """By picture, budget and policy: caches that engines share (KV connectors, encoder connectors) go by these alone."""
        told = {**inputs.hf_processor_mm_kwargs, OVERRIDE: repr(self.pruning)}
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=told))  # type: ignore[misc]

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> list[Any]:
        kwargs = _without(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [
            replace(update, replacement=partial(_shortened, update.replacement, out_mm_kwargs))
            if update.modality == "image"
            else update
            for update in updates
        ]


def _check_names(kwargs: Mapping[str, Any]) -> None:
    """Raise InputError for a setting of a request that is ours but for its spelling: it would do nothing."""
    stray = [name for name in kwargs if name.startswith("vlmprune") and name != ASKED]
    known = f"no setting of vlmprune's but {ASKED!r}"
    check(not stray, "mm_processor_kwargs", known, ", ".join(map(short, stray)))


def _without(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What is the host's own of a request's settings."""
    return {name: value for name, value in kwargs.items() if name != ASKED}


def _shortened(whole: Any, made: Any, number: int) -> Sequence[int]:
    """An image's placeholders, as many as stay."""
    return whole(number)[: int(made["image"][number][KEPT].data)]

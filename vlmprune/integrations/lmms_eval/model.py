"""The model ``vlmprune`` of lmms-eval: any checkpoint vlmprune supports, pruned by any policy, with its cost reported.

Prompts are those of lmms-eval's own ``llava_hf``: the task's messages through the checkpoint's chat template.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlmprune.errors import check
from vlmprune.integrations.lmms_eval.cost import Cost
from vlmprune.integrations.lmms_eval.requests import (
    cut,
    make_batches,
    read_count,
    read_generation,
    read_image,
    read_policy,
)
from vlmprune.models import check_config, check_stages, meter, prune

DTYPES = ("auto", "float32", "float16", "bfloat16")


class VLMPrune(lmms):  # type: ignore[misc]  # untyped base
    """``lmms-eval --model vlmprune --model_args "pretrained=...,policy=feather:layers=8/16;keep=0.3" --tasks ...``.

    With ``accelerate launch`` every process has a copy of the model and its share of the requests.

    Args:
        pretrained: checkpoint folder or hub id.
        policy: ``NAME[:field=value;...]`` as in ``vlmprune list``, with ``;`` between the fields; ``none`` = unpruned.
        revision: of the checkpoint on the hub.
        processor: where tokenizer, image processor and chat template are, if not in ``pretrained``.
        dtype: auto (the checkpoint's), float32, float16 or bfloat16.
        device: where to run; by default what accelerate picks, and always that if it runs several processes.
        device_map: hand the weights out over devices instead, e.g. ``auto``.
        attn_implementation: as transformers has it, or ``vlmprune``.
        batch_size: requests a batch (``--batch_size``).
        max_new_tokens: for tasks that name no number.
        system_prompt: a text, or a file of one, in front of every prompt.

    Raises:
        InputError: an argument that does not fit, before the weights are loaded.
        ModelError: the checkpoint cannot be pruned.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        policy: str = "none",
        revision: str = "main",
        processor: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.policy = read_policy(policy)
        self.batch_size = read_count("batch_size", batch_size)
        self.max_new_tokens = read_count("max_new_tokens", max_new_tokens)
        check(dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", repr(dtype))
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        config = AutoConfig.from_pretrained(pretrained, revision=revision)
        check_config(config)
        if self.policy is not None:
            check_stages(self.policy, config)
        self.processor = _load_processor(processor or pretrained, revision, self.batch_size)
        self.model = _load_model(
            pretrained,
            revision=revision,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            attn_implementation=attn_implementation,
        )
        if device_map is None:
            self.model.to(self.accelerator.device if device is None or self._world_size > 1 else device)
        self.device = self.model.device
        self.system_prompt = self._resolve_system_prompt(system_prompt)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer every request, in batches; reports what each task cost.

        Raises:
            InputError: a request with a video or a sound, or an image that cannot be read.
            NotPrunedError: the model ran without being pruned.
        """
        answers: dict[int, GenerationResult] = {}
        costs: dict[str, Cost] = defaultdict(Cost)
        start = time.perf_counter()
        scope = meter(self.model) if self.policy is None else prune(self.model, self.policy)
        with scope as run, tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            for members in make_batches(requests, self.batch_size):
                batch = [requests[number] for number in members]
                answers.update(zip(members, self._answer(batch), strict=True))
                costs[batch[0].args[4]].add(run.report(), len(batch))
                bar.update(len(members))
        self._report(list(answers.values()), costs, time.perf_counter() - start)
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: no benchmark that pruning is measured on needs it, and lmms-eval asks no chat model."""
        raise NotImplementedError("task: expected one that generates its answers, got one of log-likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Not offered."""
        raise NotImplementedError("task: expected one question a request, got several rounds")

    @torch.inference_mode()
    def _answer(self, batch: Sequence[Instance]) -> list[GenerationResult]:
        """The answers to one batch."""
        settings = batch[0].args[2]
        inputs = self._make_inputs(batch)
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        asked = read_generation(settings, self.max_new_tokens)
        output = self.model.generate(**inputs, **asked, pad_token_id=pad)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        read, written = inputs["attention_mask"].sum(1).tolist(), (new != pad).sum(1).tolist()
        return [
            GenerationResult(cut(text, settings.get("until")), TokenCounts(*counts))
            for text, *counts in zip(texts, read, written, strict=True)
        ]

    def _make_inputs(self, batch: Sequence[Instance]) -> Any:
        """Token ids, padded on the left, and pixel values of a batch, on the device."""
        texts, images = zip(*map(self._read, batch), strict=True)
        logger.debug("a prompt of {}: {!r}", batch[0].args[4], texts[0])
        bos = self.processor.tokenizer.bos_token
        twice = bos is not None and texts[0].startswith(bos)  # the template writes it: no second one
        inputs = self.processor(
            text=list(texts),
            images=list(images) if any(images) else None,
            return_tensors="pt",
            padding=len(batch) > 1,
            add_special_tokens=not twice,
        )
        return inputs.to(self.device, self.model.dtype)

    def _read(self, request: Instance) -> tuple[str, list[Any]]:
        """The prompt of a request, and its images in order."""
        _, to_messages, _, document, task, split = request.args
        messages = to_messages(self.task_dict[task][split][document])
        chat = ChatMessages(messages=self._apply_system_prompt(messages, self.system_prompt))
        images, videos, sounds = chat.extract_media()
        check(not videos and not sounds, task, "requests of text and images", "a video or a sound")
        messages = chat.to_hf_messages()
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return text, [read_image(image, task) for image in images]

    def _report(self, answers: list[GenerationResult], costs: dict[str, Cost], seconds: float) -> None:
        """Put speed and costs into lmms-eval's log and, under ``throughput``, into its results."""
        tokens = sum(answer.token_counts.output_tokens for answer in answers)
        costs_by_name = {
            name: value for task, cost in costs.items() for name, value in cost.means(task).items()
        }
        log_metrics(seconds, tokens, tokens / seconds, costs_by_name)


def _load_processor(source: str, revision: str, batch_size: int) -> Any:
    """Tokenizer (padding on the left), image processor and chat template. Raises InputError if one is missing."""
    processor = AutoProcessor.from_pretrained(source, revision=revision)
    template = processor.chat_template
    check(template is not None, "processor", "one with a chat template", repr(source))
    pads = processor.tokenizer.pad_token is not None
    check(batch_size == 1 or pads, "batch_size", "1 (the tokenizer has no padding token)", batch_size)
    processor.tokenizer.padding_side = "left"
    return processor


def _load_model(source: str, **settings: Any) -> Any:
    """The model with all its weights. Raises InputError if the checkpoint lacks some, which would be random numbers."""
    model, notes = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True, **settings)
    missing = sorted(notes["missing_keys"])
    check(not missing, "pretrained", f"every weight in {source!r}", f"{len(missing)} missing: {missing[:1]}")
    return model.eval()

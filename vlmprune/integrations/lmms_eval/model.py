"""The model ``vlmprune`` of lmms-eval: any checkpoint vlmprune supports, pruned by any policy, with its cost reported.

Prompts are those of lmms-eval's own ``llava_hf``: the task's messages through the checkpoint's chat template.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from vlmprune.checkpoints import Checkpoint, check_padding, generate, make_inputs
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
from vlmprune.models import Report
from vlmprune.smaller import Shown, Smaller, SmallPictures, as_they_are


class VLMPrune(lmms):  # type: ignore[misc]  # untyped base
    """``lmms-eval --model vlmprune --model_args "pretrained=...,policy=feather:layers=8/16;keep=0.3" --tasks ...``.

    With ``accelerate launch`` every process has a copy of the model and its share of the requests.

    Args:
        pretrained: checkpoint folder or hub id.
        policy: ``NAME[:field=value;...]`` as in ``vlmprune list``, with ``;`` between the fields; ``none`` = unpruned;
            ``smaller:keep=64`` = unpruned, pictures made smaller to at most 64 visual tokens each (0.25: to a quarter).
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
        InputError: an argument that does not fit, before the weights are loaded; or weights that are not all there.
        ModelError: the checkpoint cannot be pruned, or its pictures cannot be made smaller.
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
        attn_implementation: str = "sdpa",
        batch_size: int | str = 1,
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
    ) -> None:
        super().__init__()
        asked = read_policy(policy)
        self.smaller = asked if isinstance(asked, Smaller) else None
        self.policy = None if isinstance(asked, Smaller) else asked
        self.batch_size = read_count("batch_size", batch_size)
        self.max_new_tokens = read_count("max_new_tokens", max_new_tokens)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = device if device is not None and self._world_size == 1 else str(self.accelerator.device)
        checkpoint = Checkpoint(
            pretrained, place, dtype, attn_implementation, revision=revision, device_map=device_map
        )
        checkpoint.check_depth([] if self.policy is None else [self.policy])
        self.processor = Checkpoint(processor or pretrained, revision=revision).processor
        templated = self.processor.chat_template is not None
        check(templated, "processor", "one with a chat template", repr(processor or pretrained))
        check_padding(self.processor, self.batch_size)
        self.config = checkpoint.config
        if self.smaller is not None:
            self.pictures = SmallPictures(self.config, self.processor)
        self.model = checkpoint.model
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
        with tqdm(total=len(requests), desc="answers", disable=self.rank != 0) as bar:
            for members in make_batches(requests, self.batch_size):
                batch = [requests[number] for number in members]
                report, said = self._answer(batch)
                answers.update(zip(members, said, strict=True))
                costs[batch[0].args[4]].add(report, len(batch))
                bar.update(len(members))
        seconds = time.perf_counter() - start
        tokens = sum(answer.token_counts.output_tokens for answer in answers.values())
        # Into lmms-eval's log and, under ``throughput``, into its results.
        means = {name: mean for task, cost in costs.items() for name, mean in cost.means(task).items()}
        log_metrics(seconds, tokens, tokens / seconds, means)
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: no benchmark that pruning is measured on needs it, and lmms-eval asks no chat model."""
        raise NotImplementedError("task: expected one that generates its answers, got one of log-likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Not offered."""
        raise NotImplementedError("task: expected one question a request, got several rounds")

    def _answer(self, batch: Sequence[Instance]) -> tuple[Report, list[GenerationResult]]:
        """What one batch cost, and the answers to it."""
        settings = batch[0].args[2]
        shown = self._make_inputs(batch)
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        asked = read_generation(settings, self.max_new_tokens)
        with nullcontext() if self.smaller is None else self.pictures.tower(self.model):
            run, new = generate(self.model, shown.inputs, self.policy, **asked, pad_token_id=pad)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        read, written = shown.inputs["attention_mask"].sum(1).tolist(), (new != pad).sum(1).tolist()
        return shown.report(run.report(), self.config), [
            GenerationResult(cut(text, settings.get("until")), TokenCounts(*counts))
            for text, *counts in zip(texts, read, written, strict=True)
        ]

    def _make_inputs(self, batch: Sequence[Instance]) -> Shown:
        """A batch on the device, its pictures as they are or smaller."""
        texts, images = zip(*map(self._read, batch), strict=True)
        task = batch[0].args[4]
        logger.debug("a prompt of {}: {!r}", task, texts[0])
        if self.smaller is None:
            shown = as_they_are(self.config, make_inputs(self.processor, texts, images, task))
        else:
            shown = self.pictures.inputs(texts, images, self.smaller.keep, task)
        return shown.to(self.device, self.model.dtype)

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

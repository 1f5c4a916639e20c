"""One question to one model: the prompt becomes inputs, and one greedy generation becomes an Outcome."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from vlmprune.cli.load import Loaded
from vlmprune.errors import InputError, check, first_line
from vlmprune.models import Report, meter, prune
from vlmprune.policies.base import PruningPolicy


@dataclass(frozen=True)
class Outcome:
    """What one run said, kept and cost.

    Attributes:
        policy: the policy as it was typed, or None for the unpruned run.
        answer: the generated text.
        kept: per stage, the numbers (prompt order) of the visual tokens that survived it.
        report: tokens, FLOPs and seconds.
        settings: the policy as data.
    """

    policy: str | None
    answer: str
    kept: tuple[tuple[int, ...], ...]
    report: Report
    settings: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        """A heading for tables and pictures."""
        return self.policy or "unpruned"


def build_text(processor: Any, prompt: str, images: int) -> str:
    """The full prompt: as typed if it holds the image placeholder token, else through the chat template."""
    token = processor.image_token
    if token in prompt:
        text = prompt
    else:
        template = processor.chat_template
        expected = f"a text with {token!r} in it (this checkpoint has no chat template to add it)"
        check(template is not None, "--prompt", expected, repr(prompt))
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        try:
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # templates may refuse a message, or be broken
            raise InputError(
                f"--prompt: expected what the checkpoint's chat template takes, got: {error}"
            ) from error
    check(
        text.count(token) == images, "--prompt", f"{images} x {token!r}, one per --image", text.count(token)
    )
    return text


def build_inputs(processor: Any, text: str, images: list[Image.Image]) -> Any:
    """Token ids and pixel values, on the CPU. Raises InputError for what the processor does not take."""
    bos = processor.tokenizer.bos_token
    twice = bos is not None and text.startswith(bos)  # a template that writes <bos> must not get a second one
    try:
        return processor(text=text, images=images, return_tensors="pt", add_special_tokens=not twice)
    except ValueError as error:
        raise InputError(
            f"--image: expected what the checkpoint's processor takes, got: {first_line(error)}"
        ) from error


def generate(
    loaded: Loaded,
    inputs: Any,
    label: str | None,
    policy: PruningPolicy | None,
    limit: int,
    streamer: Any = None,
) -> Outcome:
    """Generate greedily, pruned by ``policy`` (None = only measured). A streamer waits for every token: not for timing."""
    with meter(loaded.model) if policy is None else prune(loaded.model, policy) as run:
        output = loaded.model.generate(
            **inputs, max_new_tokens=limit, do_sample=False, num_beams=1, streamer=streamer
        )
    answer = output[0, inputs["input_ids"].shape[1] :]
    return Outcome(
        policy=label,
        answer=loaded.processor.tokenizer.decode(answer, skip_special_tokens=True).strip(),
        kept=tuple(tuple(run.kept_at(i).tolist()) for i in range(len(run.stages))),
        report=run.report(),
        settings=None if policy is None else policy.to_dict(),
    )


def median(outcomes: list[Outcome]) -> Outcome:
    """The first of several equal runs, with the median of each duration."""
    first = outcomes[0]
    runs = [asdict(outcome.report.seconds) for outcome in outcomes]
    seconds = replace(
        first.report.seconds, **{name: statistics.median(r[name] for r in runs) for name in runs[0]}
    )
    return replace(first, report=replace(first.report, seconds=seconds))

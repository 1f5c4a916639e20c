"""What the tests of the vLLM plugin share: engines, and the same request asked of transformers."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vlmprune
from vlmprune.policies import PruningPolicy, Reduction

ROOT = Path(__file__).parents[3]
GLYPHWORLD = ROOT / "examples" / "glyphworld"
CHECKPOINT = GLYPHWORLD / "checkpoint"
SCENES = sorted((GLYPHWORLD / "images").glob("scene_*.png"))
QUESTIONS = ("locate the green phone .", "what does the sign say ?", "how many phones are there ?")
LLAVA = "VLMPruneLlavaForConditionalGeneration"

ENGINE: Mapping[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": 32,  # with vLLM's 128 a short prompt fills no block, and nothing is cached
    "seed": 0,
}
"""Settings of every engine here."""


@dataclass(frozen=True)
class Asked:
    """One request: its text, with a placeholder for each picture, and the pictures."""

    text: str
    images: tuple[Any, ...] = ()

    def prompt(self, **kwargs: Any) -> dict[str, Any]:
        """As ``LLM.generate`` takes it; ``vlmprune_keep=64`` is a budget of its own."""
        made: dict[str, Any] = {"prompt": self.text}
        if self.images:
            made["multi_modal_data"] = {"image": [*self.images]}
        if kwargs:
            made["mm_processor_kwargs"] = kwargs
        return made


def scene(number: int) -> Any:
    """A picture of glyphworld."""
    return Image.open(SCENES[number % len(SCENES)]).convert("RGB")


def question(number: int, images: int = 1) -> Asked:
    """A request to glyphworld's checkpoint."""
    places = "<image> " * images
    text = f"<bos> USER: {places}{QUESTIONS[number % len(QUESTIONS)]} ASSISTANT:"
    return Asked(text, tuple(scene(number + i) for i in range(images)))


def overrides(policy: object, architecture: str = LLAVA) -> dict[str, Any]:
    """The ``hf_overrides`` that turn pruning on."""
    return {"architectures": [architecture], "vlmprune": policy}


@contextmanager
def engine(
    model: Path, policy: Mapping[str, Any] | None = None, architecture: str = LLAVA, **settings: Any
) -> Iterator[Any]:
    """An ``LLM``; in this process unless ``VLLM_ENABLE_V1_MULTIPROCESSING`` is 1."""
    from vllm import LLM

    over = {} if policy is None else overrides(policy, architecture)
    llm = LLM(str(model), **{**ENGINE, "hf_overrides": over, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def said(llm: Any, prompts: Sequence[Mapping[str, Any]], steps: int = 8, **sampling: Any) -> list[Any]:
    """Greedy answers, in order: vLLM's own outputs."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=steps, **sampling)
    return llm.generate([dict(prompt) for prompt in prompts], how, use_tqdm=False)


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    """What they said, as ids."""
    return [[*output.outputs[0].token_ids] for output in outputs]


def preemptions(llm: Any) -> float:
    """How many requests an engine had to compute again; it was started with ``disable_log_stats=False``."""
    return sum(one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions")


@dataclass(frozen=True)
class Noting(PruningPolicy):
    """The same choice, and what it was: a ``Reduction`` handed to ``note``."""

    policy: PruningPolicy
    note: Callable[[Reduction], None]

    layers = (0,)

    def needs(self, layer: int) -> Any:
        return self.policy.needs(layer)

    def select(self, ctx: Any) -> Any:
        choice = self.policy.select(ctx)
        self.note(choice if isinstance(choice, Reduction) else Reduction(choice))
        return choice

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return self.policy.kept(tokens, images, layer)


@dataclass(frozen=True)
class Together(PruningPolicy):
    """What was chosen of each image alone, in a prompt of all of them.

    Args:
        choices: of the images, in order.
        positions: "pack", or "keep" those that tokens had.
    """

    choices: tuple[Reduction, ...]
    positions: str

    layers = (0,)

    def needs(self, layer: int) -> Any:
        return vlmprune.Needs(hidden=True)

    def select(self, ctx: Any) -> Any:
        firsts = accumulate(ctx.images()[0], initial=0)
        index = [choice.index + first for choice, first in zip(self.choices, firsts, strict=False)]
        made = [choice.hidden for choice in self.choices if choice.hidden is not None]
        return Reduction(torch.cat(index, 1), torch.cat(made, 1) if made else None, self.positions)

    def kept(self, tokens: int, images: float, layer: int) -> int:
        return sum(choice.index.shape[1] for choice in self.choices)


class Reference:
    """A checkpoint in transformers, asked as an engine is asked; each image is pruned as if it were alone.

    Args:
        model: its folder.
        positions: of the kept tokens: "pack" as vLLM's LLaVAs have them, or "keep" as its Qwen-VLs.
    """

    def __init__(self, model: Path, positions: str = "pack") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(model)
        self.positions = positions

    def __call__(self, asked: Asked, policy: PruningPolicy | None, steps: int = 8) -> list[int]:
        """The greedy answer's ids, the end of the text among them as vLLM has it."""
        if policy is not None and asked.images:
            if "positions" in policy.__dataclass_fields__:  # of merged tokens it is also their order
                policy = replace(policy, positions=self.positions)
            text = self.processor.image_token + asked.text.rpartition(self.processor.image_token)[2]
            choices: list[Reduction] = []
            for image in asked.images:
                self._answer(Asked(text, (image,)), Noting(policy, choices.append), steps=1)
            assert len(choices) == len(asked.images)
            policy = Together(tuple(choices), self.positions)
        return self._answer(asked, policy, steps)

    @torch.inference_mode()
    def _answer(self, asked: Asked, policy: PruningPolicy | None, steps: int) -> list[int]:
        inputs = self.processor(
            text=asked.text, images=[*asked.images] or None, return_tensors="pt", add_special_tokens=False
        )
        with vlmprune.meter(self.model) if policy is None else vlmprune.prune(self.model, policy):
            out = self.model.generate(**inputs, max_new_tokens=steps, do_sample=False)
        return out[0, inputs["input_ids"].shape[1] :].tolist()


def environment(**more: str) -> dict[str, str]:
    """For a server of its own process: two cores, no network, little memory; what it runs may be of these helpers."""
    paths = [str(ROOT / "tests" / "_lib"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        **more,
    }

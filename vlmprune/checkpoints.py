"""A checkpoint: how to load it, ask it and prune it. All that can fail without the weights fails before they are read."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vlmprune.errors import InputError, check, first_line
from vlmprune.models import Run, check_config, check_stages, meter, prune, takes_videos
from vlmprune.policies.base import PruningPolicy
from vlmprune.precision import slow_on_cpu

DTYPES = ("auto", "float32", "float16", "bfloat16")
log = logging.getLogger(__name__)


class Checkpoint:
    """A model with its processor. Configuration, processor and weights are each read when first asked for, and kept.

    Attributes:
        source: the folder or hub id.
        device: where the model is put, "cpu", "cuda" or one GPU of several.
        attention: its attention function.
        stored: name of the dtype that the weights are stored in, where they were widened for the CPU's sake; else None.

    >>> checkpoint = Checkpoint("examples/glyphworld/checkpoint", device="cpu", dtype="bfloat16")
    >>> checkpoint.config.model_type, checkpoint.dtype, checkpoint.precision
    ('llava', 'bfloat16', 'bfloat16')
    """

    def __init__(
        self,
        source: str,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "sdpa",
        *,
        revision: str = "main",
        device_map: str | None = None,
    ) -> None:
        """Note what to load.

        Args:
            source: a folder or hub id.
            device: "cpu", "cuda", "cuda:1", or "auto", the GPU if there is one.
            dtype: one of ``DTYPES``; "auto" = as stored, but float32 on a CPU that is slow in what is stored.
            attention: any attention function that transformers knows.
            revision: of the checkpoint on the hub.
            device_map: hand the weights out over devices instead, as transformers does it for this word.

        Raises:
            InputError: another dtype, or a GPU or FlashAttention where there is none.
        """
        there = torch.cuda.is_available()
        self.device = device if device != "auto" else "cuda" if there else "cpu"
        cuda = self.device.startswith("cuda")
        check(there or not cuda, "device", "auto or cpu (torch sees no CUDA device here)", device)
        usable = cuda and find_spec("flash_attn") is not None
        expected = (
            "sdpa, eager or vlmprune (flash_attention_2 needs a CUDA device and the flash-attn package)"
        )
        check(attention != "flash_attention_2" or usable, "attention", expected, attention)
        check(dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}", repr(dtype))
        self.source, self.attention, self._dtype = source, attention, dtype
        self._revision, self._device_map = revision, device_map
        self.stored: str | None = None

    @classmethod
    def of(cls, model: Any, processor: Any) -> Checkpoint:
        """One whose model and processor are loaded already. Raises InputError or ModelError for what cannot be pruned."""
        check_config(model.config)
        attention = model.config._attn_implementation
        made = cls(model.config.name_or_path, model.device.type, attention=attention)
        made.config, made.processor, made.model = model.config, processor, model
        return made

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype."""
        return _name(self.model.dtype)

    @property
    def precision(self) -> str:
        """The dtype and, if it is not the one that was stored, why."""
        model_dtype = self.dtype  # loads, if need be
        return (
            model_dtype
            if self.stored is None
            else f"{model_dtype} (stored as {self.stored}, slow on this CPU)"
        )

    @cached_property
    def config(self) -> Any:
        """The configuration. Raises InputError or ModelError for what is not there or cannot be pruned."""
        source = self.source
        if Path(source).exists() or source.startswith((".", "/", "~")):
            there = (Path(source) / "config.json").is_file()
            check(there, "checkpoint", "a checkpoint folder with a config.json, or a hub id", repr(source))
        try:
            config = AutoConfig.from_pretrained(source, revision=self._revision)
        except (OSError, ValueError, StrictDataclassError) as error:
            expected = f"a checkpoint folder or a hub id, got {source!r}"
            raise InputError(f"checkpoint: expected {expected}: {first_line(error)}") from error
        check_config(config)
        depth = config.text_config.num_hidden_layers
        log.info("configuration of %s: %s, %d decoder layers", source, config.model_type, depth)
        return config

    @cached_property
    def processor(self) -> Any:
        """Tokenizer, image processor, chat template. Raises InputError if one, or a package for it, is missing or broken."""
        try:
            return AutoProcessor.from_pretrained(self.source, revision=self._revision)
        except (ImportError, OSError, ValueError) as error:
            expected = f"a processor and tokenizer in {self.source!r}"
            raise InputError(f"checkpoint: expected {expected}, got: {first_line(error)}") from error

    @cached_property
    def model(self) -> Any:
        """The model on its device, in evaluation mode. Raises InputError if the checkpoint does not have all its weights."""
        source, config, start = self.source, self.config, time.perf_counter()
        log.info("loading the weights of %s", source)
        try:
            model, notes = AutoModelForImageTextToText.from_pretrained(
                source,
                config=config,
                dtype=self._dtype if self._dtype == "auto" else getattr(torch, self._dtype),
                attn_implementation=self.attention,
                revision=self._revision,
                device_map=self._device_map,
                output_loading_info=True,
            )
        except SafetensorError as error:
            raise InputError(
                f"checkpoint: expected whole weight files in {source!r}, got: {error}"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:  # no weights, or shapes that do not fit
            expected = f"weights that fit the configuration of {source!r}"
            raise InputError(f"checkpoint: expected {expected}, got: {first_line(error)}") from error
        # transformers fills what is missing with random numbers and only logs it.
        missing = sorted(notes["missing_keys"])
        got = f"{len(missing)} missing, first {missing[:1]}"
        check(not missing, "checkpoint", f"every weight in {source!r}", got)
        spare = sorted(key for key in notes["unexpected_keys"] if ".layers." in key)
        expected = "as many layers in the configuration as in the weights"
        check(not spare, "checkpoint", expected, f"no place for {spare[:1]}")
        if self._device_map is None:
            if self._dtype == "auto" and self.device == "cpu" and slow_on_cpu(model.dtype):
                self.stored, model = _name(model.dtype), model.float()
            model = model.to(self.device)
        size = sum(weight.nbytes for weight in model.parameters()) / 1e9
        where = f"{_name(model.dtype)} on {model.device}, {self.attention} attention"
        log.info("%.3g GB of weights in %s, loaded in %.1f s", size, where, time.perf_counter() - start)
        return model.eval()

    def check_depth(self, policies: Iterable[PruningPolicy]) -> None:
        """Read the configuration, and raise InputError if a policy has a stage beyond the decoder's last layer."""
        config = self.config
        for policy in policies:
            check_stages(policy, config)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build_text(processor: Any, prompt: str, pictures: int, kind: Literal["image", "video"] = "image") -> str:
    """The full prompt: as typed if it holds the placeholder token, else through the chat template.

    Args:
        processor: the checkpoint's.
        prompt: what is asked.
        pictures: how many images or videos stand in front of it.
        kind: which of both.

    Raises:
        InputError: not one placeholder an image or video, or a prompt that the template does not take.
    """
    token = processor.image_token if kind == "image" else processor.video_token
    if token in prompt:
        text = prompt
    else:
        template = processor.chat_template
        expected = f"a text with {token!r} in it (this checkpoint has no chat template to add it)"
        check(template is not None, "prompt", expected, repr(prompt))
        content = [{"type": kind}] * pictures + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        try:
            text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # templates may refuse a message, or be broken
            raise InputError(
                f"prompt: expected what the checkpoint's chat template takes, got: {error}"
            ) from error
    count = text.count(token)
    check(count == pictures, "prompt", f"{pictures} x {token!r}, one per {kind}", count)
    return text


def make_inputs(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[list[Image.Image]],
    name: str,
    *,
    clips: Sequence[list[Image.Image]] = (),
    **image_settings: Any,
) -> Any:
    """Token ids, padded on the left, and pixel values of a batch, on the CPU.

    Args:
        processor: the checkpoint's.
        texts: full prompts, as ``build_text`` makes them.
        images: those of each prompt, in its order.
        name: what errors call the images.
        clips: the frames of the videos of all prompts, in their order; all of them are shown.
        image_settings: for the image processor, in place of its own.

    Raises:
        InputError: what the processor does not take, or several prompts where nothing can pad them.
    """
    check_padding(processor, len(texts))
    options = {
        "padding": len(texts) > 1,
        "padding_side": "left",
        "add_special_tokens": not has_bos(processor, texts),
        **image_settings,
    }
    given: dict[str, Any] = {"images": list(images) if any(images) else None}
    if clips:
        videos = [np.stack([np.asarray(frame).transpose(2, 0, 1) for frame in clip]) for clip in clips]
        given |= {"videos": videos, "do_sample_frames": False}
    try:
        return processor(text=list(texts), return_tensors="pt", **given, **options)
    except ValueError as error:
        raise InputError(
            f"{name}: expected what the checkpoint's processor takes, got: {first_line(error)}"
        ) from error


def is_visual(config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Which token ids stand for visual tokens, of images or of videos: bool of the same shape."""
    there = ids == config.image_token_id
    return there | (ids == config.video_token_id) if takes_videos(config) else there


def check_padding(processor: Any, batch_size: int) -> None:
    """Raise InputError if so many prompts at once would need padding and the tokenizer has none."""
    can = batch_size == 1 or processor.tokenizer.pad_token is not None
    check(can, "batch_size", "1 (the tokenizer has no padding token)", batch_size)


def has_bos(processor: Any, texts: Sequence[str]) -> bool:
    """Whether prompts bring their own first token, as templates may, so that the tokenizer must not add a second one."""
    bos = processor.tokenizer.bos_token
    starts = {bos is not None and text.startswith(bos) for text in texts}
    check(len(starts) == 1, "prompt", f"{bos!r} at the start of every prompt or of none", "both")
    return starts.pop()


@torch.inference_mode()
def generate(model: Any, inputs: Any, policy: PruningPolicy | None, **settings: Any) -> tuple[Run, Any]:
    """Pruned by ``policy`` (None = only measured): how the prompts were pruned, and the new tokens ``[B, new]`` int64.

    Greedy unless ``settings``, which are those of transformers' ``generate``, say otherwise.
    """
    settings = {"do_sample": False, "num_beams": 1} | settings
    if policy is not None:
        policy.forget()  # what is asked again, to be timed, costs what it did
    with meter(model) if policy is None else prune(model, policy) as run:
        output = model.generate(**inputs, **settings)
    return run, output[:, inputs["input_ids"].shape[1] :]

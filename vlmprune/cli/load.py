"""Turn what was typed into checked objects and a loaded model. All that can fail without the weights fails first."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from vlmprune.errors import InputError, check, first_line
from vlmprune.models import check_config, check_layers
from vlmprune.policies.base import PruningPolicy


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, its processor, and how it was loaded."""

    model: Any
    processor: Any
    device: str
    dtype: str
    attention: str


def quiet() -> None:
    """Silence transformers' hints and progress bars in this process; the command line has its own."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_config(source: str) -> Any:
    """Read a checkpoint's configuration and refuse what cannot be pruned. Raises InputError or ModelError."""
    if Path(source).exists() or source.startswith((".", "/", "~")):
        there = (Path(source) / "config.json").is_file()
        check(there, "--model", "a checkpoint folder with a config.json, or a hub id", repr(source))
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise InputError(
            f"--model: expected a checkpoint folder or a hub id, got {source!r}: {first_line(error)}"
        ) from error
    check_config(config)
    return config


def check_depth(policies: list[PruningPolicy], config: Any) -> None:
    """Raise InputError if a policy has a stage beyond the decoder's last layer."""
    for policy in policies:
        check_layers(policy, config)


def pick_device(wanted: str) -> str:
    """``auto`` is the GPU if there is one. Raises InputError for a GPU that is not there."""
    there = torch.cuda.is_available()
    check(wanted != "cuda" or there, "--device", "auto or cpu (torch sees no CUDA device here)", "cuda")
    return wanted if wanted != "auto" else "cuda" if there else "cpu"


def check_attention(name: str, device: str) -> None:
    """Raise InputError if FlashAttention is asked for where it cannot run."""
    usable = device == "cuda" and find_spec("flash_attn") is not None
    expected = "sdpa, eager or vlmprune (flash_attention_2 needs a CUDA device and the flash-attn package)"
    check(name != "flash_attention_2" or usable, "--attn", expected, name)


def load_processor(source: str) -> Any:
    """Load tokenizer, image processor and chat template. Raises InputError if one, or a package for it, is missing or broken."""
    try:
        return AutoProcessor.from_pretrained(source)
    except (ImportError, OSError, ValueError) as error:
        raise InputError(
            f"--model: expected a processor and tokenizer in {source!r}, got: {first_line(error)}"
        ) from error


def load(source: str, config: Any, processor: Any, device: str, dtype: str, attention: str) -> Loaded:
    """Load the weights onto ``device``. Raises InputError if the checkpoint does not have them all."""
    try:
        model, notes = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise InputError(f"--model: expected whole weight files in {source!r}, got: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:  # no weights, or shapes that do not fit
        raise InputError(
            f"--model: expected weights that fit the configuration of {source!r}, got: {first_line(error)}"
        ) from error
    # transformers fills what is missing with random numbers and only logs it.
    missing = sorted(notes["missing_keys"])
    check(
        not missing, "--model", f"every weight in {source!r}", f"{len(missing)} missing, first {missing[:1]}"
    )
    spare = sorted(key for key in notes["unexpected_keys"] if ".layers." in key)
    check(
        not spare,
        "--model",
        "as many layers in the configuration as in the weights",
        f"no place for {spare[:1]}",
    )
    model = model.to(device).eval()
    return Loaded(model, processor, device, str(model.dtype).removeprefix("torch."), attention)

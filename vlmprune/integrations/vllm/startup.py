"""What is checked when an engine starts, before anything is loaded: vLLM's hook for the configuration of an architecture."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vlmprune import env
from vlmprune.errors import check
from vlmprune.integrations.vllm import ARCHITECTURES, TESTED
from vlmprune.integrations.vllm.settings import ASKED, Settings
from vlmprune.models.host.families import FAMILIES, token_grid
from vlmprune.models.host.parts import check_config

RATE = 1e-17
"""``video_pruning_rate`` that has the runner ask for M-RoPE positions once more, and prunes no video (1 - RATE is 1.0)."""


class PrunedConfig(VerifyAndUpdateConfig):
    """Refuses, in the process that starts the engine, what the plugin cannot serve. Errors are InputError or ModelError."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check version, policy, budget and model; have positions recomputed where they have three dimensions."""
        check_version()
        config, multimodal = model_config.hf_config, model_config.multimodal_config
        settings = Settings.of(config)
        architecture = ARCHITECTURES[config.model_type][0]
        got = model_config.architecture
        check(got == architecture, "architectures", f"{architecture!r} for {config.model_type!r}", repr(got))
        check_config(config)
        family = FAMILIES[config.model_type]
        if family.square:
            check_room(settings, *token_grid(config))
        asked = multimodal.mm_processor_kwargs or {}
        for_requests = f"no {ASKED!r} for all requests (keep belongs into hf_overrides)"
        check(ASKED not in asked, "mm_processor_kwargs", for_requests, repr(asked))
        if not family.packs:
            multimodal.video_pruning_rate = RATE

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check what hides the vision tower from a policy that reads it; pace the encoder."""
        config = vllm_config.model_config
        pace(vllm_config.scheduler_config, config.hf_config)
        if Settings.of(config.hf_config).policy.needs(0).vision:
            compiled = vllm_config.compilation_config.compile_mm_encoder
            check(not compiled, "compile_mm_encoder", "False where a policy reads the vision tower", compiled)
            mode = config.multimodal_config.mm_encoder_tp_mode
            reads = "'weights' where a policy reads the vision tower"
            check(mode == "weights", "mm_encoder_tp_mode", reads, repr(mode))


def check_version() -> None:
    """Raise InputError for a vLLM that the plugin was never run with, unless VLMPRUNE_VLLM_UNTESTED=1."""
    release = ".".join(vllm.__version__.split(".")[:2])
    known = env.VLLM_UNTESTED or release == TESTED
    check(known, "vllm", f"{TESTED} (or VLMPRUNE_VLLM_UNTESTED=1, to try)", vllm.__version__)


def check_room(settings: Settings, rows: int, columns: int) -> None:
    """Raise InputError where more is to be kept than any image has."""
    tokens, keep = rows * columns, vars(settings.policy).get("keep")
    for name, value in (("keep", keep), ("max_keep", settings.max_keep)):
        room = not isinstance(value, int) or value <= tokens
        check(room, name, f"at most the {tokens} tokens of an image", value)


def pace(scheduler: Any, config: Any) -> None:
    """Have a step encode as many images as it would unpruned; of families whose images all have as many tokens.

    vLLM bounds what a step encodes in tokens of the prompt. Of 576 tokens 64 are left, and nine times the images would be
    encoded at once, while every other request waits for its next token.
    """
    family = FAMILIES[config.model_type]
    if family.square:
        rows, columns = token_grid(config)
        most = Settings.of(config).most(rows * columns)
        scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens * most // (rows * columns)

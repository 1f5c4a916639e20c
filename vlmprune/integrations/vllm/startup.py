"""What is checked when an engine starts, before anything is loaded: vLLM's hook for the configuration of an architecture."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vlmprune import env
from vlmprune.errors import check
from vlmprune.integrations.vllm import ARCHITECTURES, TESTED
from vlmprune.integrations.vllm.settings import ASKED, OVERRIDE, Settings, check_vision_layers, warn_packed
from vlmprune.models.host.families import FAMILIES, TOWERS
from vlmprune.models.host.names import attribute
from vlmprune.models.host.parts import check_config

RATE = 1e-17
"""``video_pruning_rate`` that has the runner ask for M-RoPE positions once more, and prunes no video (1 - RATE is 1.0)."""

CPU_WORKER = "vlmprune.integrations.vllm.cpu.Worker"


class PrunedConfig(VerifyAndUpdateConfig):
    """Refuses, in the process that starts the engine, what the plugin cannot serve.

    By InputError, which vLLM hands on within pydantic's ValidationError (a ValueError too), or by ModelError, as it is.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check version, policy and model; say where tokens stand, or have positions of three dimensions recomputed."""
        check_version()
        config, multimodal = model_config.hf_config, model_config.multimodal_config
        settings = Settings.of(config)
        check_architecture(model_config)
        check_config(config)
        depth, loaded = vision_layers(config)
        check_vision_layers(settings.policy, depth, loaded)
        asked = multimodal.mm_processor_kwargs or {}
        for_requests = f"no {ASKED!r} for all requests ('keep' in hf_overrides[{OVERRIDE!r}] is theirs)"
        check(ASKED not in asked, "mm_processor_kwargs", for_requests, repr(asked))
        if FAMILIES[config.model_type].packs:
            warn_packed(settings.policy)
        else:
            multimodal.video_pruning_rate = RATE

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the budgets by the largest image, and what hides the tower, miscounts it or loses positions; pace the tower."""
        from vllm.multimodal import MULTIMODAL_REGISTRY

        config, lora = vllm_config.model_config, vllm_config.lora_config
        settings = Settings.of(config.hf_config)
        largest = MULTIMODAL_REGISTRY.get_processing_info(config).get_max_image_tokens()
        settings.check_room(largest)
        family = FAMILIES[config.hf_config.model_type]
        if family.square or settings.by_share:
            pace(vllm_config.scheduler_config, settings.most(largest), largest)
        if not family.packs:
            check_rotated(vllm_config.parallel_config)
        if lora is not None:
            inside = lora.enable_tower_connector_lora
            whole = "False (vLLM lays LoRA over as many of the tower's tokens as stay; the tower has all)"
            check(not inside, "enable_tower_connector_lora", whole, inside)
        captured = vllm_config.compilation_config.cudagraph_mm_encoder
        check(
            not captured, "cudagraph_mm_encoder", "False (a captured tower hands on whole images)", captured
        )
        if settings.policy.needs(0).vision:
            check_seen(vllm_config.compilation_config.compile_mm_encoder, config.multimodal_config)


class UnprunedConfig(VerifyAndUpdateConfig):
    """Refuses settings of ours beside an architecture of vLLM's own, which would ignore them; else does nothing."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check that there are none."""
        if OVERRIDE in vars(model_config.hf_config):
            check_version()
            Settings.of(model_config.hf_config)
            check_architecture(model_config)


def pace(scheduler: Any, kept: int, tokens: int) -> None:
    """Have a step encode as many images as it would unpruned, where of any the same share stays: ``kept`` of ``tokens``.

    vLLM bounds what a step encodes in tokens of the prompt. Of 576 tokens 64 are left, and nine times the images would be
    encoded at once, while every other request waits for its next token.
    """
    scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens * kept // tokens


def check_seen(compiled: bool, multimodal: Any) -> None:
    """Raise InputError where a vision tower runs so that it cannot be read."""
    check(not compiled, "compile_mm_encoder", "False where a policy reads the vision tower", compiled)
    mode = multimodal.mm_encoder_tp_mode
    check(
        mode == "weights", "mm_encoder_tp_mode", "'weights' where a policy reads the vision tower", repr(mode)
    )


def check_rotated(parallel: Any) -> None:
    """Raise InputError where positions would be put right on some ranks only; take a worker that has them put right."""
    ranks = parallel.pipeline_parallel_size
    one = "1 with this model (vLLM puts positions right on the first rank alone)"
    check(ranks == 1, "pipeline_parallel_size", one, ranks)
    if current_platform.is_cpu():
        workers = parallel.worker_cls
        ours = f"{CPU_WORKER!r} on the CPU with this model (or nothing)"
        check(workers in ("auto", CPU_WORKER), "worker_cls", ours, repr(workers))
        parallel.worker_cls = CPU_WORKER


def check_version() -> None:
    """Raise InputError for a vLLM that the plugin was never run with, unless VLMPRUNE_VLLM_UNTESTED=1."""
    expected = f"{TESTED}, with which vlmprune was tested (VLMPRUNE_VLLM_UNTESTED=1 tries another)"
    check(env.VLLM_UNTESTED or tested(), "vllm", expected, vllm.__version__)


def tested() -> bool:
    """Whether this is the release of vLLM that the plugin was run with."""
    return ".".join(vllm.__version__.split(".")[:2]) == TESTED


def check_architecture(model_config: Any) -> None:
    """Raise InputError unless vLLM has chosen the pruned architecture of the checkpoint's family."""
    family, got = model_config.hf_config.model_type, model_config.architecture
    wanted = ARCHITECTURES[family][0]
    expected = f"[{wanted!r}] beside {OVERRIDE!r} in hf_overrides for a checkpoint of {family!r}"
    check(got == wanted, "architectures", expected, repr([got]))


def vision_layers(config: Any) -> tuple[int, int]:
    """How many layers the vision tower has, and how many of them vLLM loads: those below the deepest that is projected."""
    depth: int = attribute(config.vision_config, TOWERS[config.vision_config.model_type].depth)
    if not FAMILIES[config.model_type].selects:
        return depth, depth
    told = config.vision_feature_layer
    projected = told if isinstance(told, list | tuple) else [told]
    return depth, max(layer if layer >= 0 else depth + layer + 1 for layer in projected)

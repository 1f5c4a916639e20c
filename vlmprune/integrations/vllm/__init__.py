"""vLLM: its plugin, announced by the entry point ``vllm.general_plugins``; images are pruned before the language model.

Turned on per engine, with the pruned architecture of the checkpoint's family and a policy::

    hf_overrides={
        "architectures": ["VLMPruneLlavaForConditionalGeneration"],
        "vlmprune": {"policy": "divprune", "keep": 128, "positions": "pack"},
    }

A request may ask for less: ``mm_processor_kwargs={"vlmprune_keep": 64}``. docs/vllm.md says what runs and what cannot.
"""

from __future__ import annotations

from logging import getLogger

from vlmprune.errors import first_line

TESTED = "0.32"
"""Release of vLLM that the plugin was run with."""

ARCHITECTURES = {
    "llava": ("VLMPruneLlavaForConditionalGeneration", "llava:Llava"),
    "llava_next": ("VLMPruneLlavaNextForConditionalGeneration", "llava:LlavaNext"),
    "llava_onevision": ("VLMPruneLlavaOnevisionForConditionalGeneration", "llava:LlavaOnevision"),
    "qwen2_5_vl": ("VLMPruneQwen2_5_VLForConditionalGeneration", "qwen:Qwen25VL"),
    "qwen3_vl": ("VLMPruneQwen3VLForConditionalGeneration", "qwen:Qwen3VL"),
}
"""By ``config.model_type``: the pruned architecture, and where its class is."""

UNPRUNED = (
    *(architecture.removeprefix("VLMPrune") for architecture, _ in ARCHITECTURES.values()),
    "Qwen2VLForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "InternVLChatModel",
    "Idefics3ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
)
"""vLLM's own architectures of these families, and of those that are pruned in transformers alone: they ignore a policy."""


def register() -> None:
    """Tell vLLM the pruned architectures. It calls this in each of its processes, pruned or not, so nothing else happens.

    In a vLLM without the places for it this warns, and vLLM then knows no pruned architecture: an error would end every engine
    in that environment, also those that prune nothing.
    """
    import vllm

    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        from vlmprune.integrations.vllm.startup import PrunedConfig, UnprunedConfig, tested
    except ImportError as error:
        said = "vlmprune: expected vLLM %s, got %s, which has no pruned architectures now (%s)"
        getLogger(__name__).warning(said, TESTED, vllm.__version__, first_line(error))
        return
    for architecture, place in ARCHITECTURES.values():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
        MODELS_CONFIG_MAP[architecture] = PrunedConfig
    if tested():  # in another release these may have become something else, also for those who prune nothing
        for architecture in UNPRUNED:
            MODELS_CONFIG_MAP.setdefault(architecture, UnprunedConfig)

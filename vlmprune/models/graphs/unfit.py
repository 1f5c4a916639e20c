"""Why a prefill cannot be a graph, as far as its call tells: each in a few words, for ``run.report().graph``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from vlmprune.models.host.cache_layers import PrunedLayer
from vlmprune.models.host.names import CACHE, DEEPSTACK
from vlmprune.models.prefill import RUNNING, Prefill
from vlmprune.models.unpruned import Unpruned

GIVEN = {"inputs_embeds", "attention_mask", "position_ids", *CACHE, RUNNING, *DEEPSTACK}
"""Arguments of the text model that a graph has its own of."""
SETTINGS = {"use_cache", "return_dict", "cache_position", "logits_to_keep"}
"""Those that change nothing of what it computes."""
ASKS = ("output_hidden_states", "output_attentions")


def unfit_model(text: Any, policy: Any) -> str | None:
    """Why no prefill of this text model, pruned by this policy, can be one; None if some can."""
    try:
        hash(policy)
    except TypeError as error:
        return f"a policy's settings must tell it apart ({error})"
    if policy is not None and policy.rectify:
        return "rectify=True, whose masks are not captured"
    if policy is not None and policy.restores:
        return "a stage brings tokens back"
    if "forward" in vars(text):
        return "other code has put a forward of its own on the model (accelerate does, for a device_map)"
    weights = [*text.parameters()]
    if any(isinstance(x, DTensor) for x in weights):
        return "weights are shared between ranks"
    if len({x.device for x in weights}) > 1:
        return "weights on several devices"
    return None


def hooked(text: Any) -> str | None:
    """Whether a hook of other code is on one of its modules; transformers' own do nothing unless they are asked to."""
    for part in text.modules():
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            home = getattr(getattr(hook, "func", hook), "__module__", None) or ""
            if home.partition(".")[0] not in ("vlmprune", "transformers"):
                return f"a hook of other code on a {type(part).__name__}, which would see no replay"
    return None


def unfit_call(prefill: Prefill, given: Mapping[str, Any], text: Any) -> str | None:
    """Why this prefill, with these arguments of the text model, cannot be one; None if it can, for all the host knows."""
    call = prefill.call
    if call.visual is None or call.visuals is None:
        return "no images"
    if call.past or call.visuals.cut:
        return "a prompt in several calls, or behind another"
    if call.tail:
        return "candidates of assisted decoding behind the prompt"
    if torch.is_grad_enabled():
        return "gradients are on (torch.no_grad)"
    if call.predicting is not None:
        return "labels are given"
    if text.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(call.visual.device.type):
        return "autocast"
    if _get_current_dispatch_mode() is not None:  # this thread's
        return "a dispatch mode watches the operations (FlopCounterMode does)"
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        return "global hooks on every module"
    if call.visual.is_cuda and torch.cuda.is_current_stream_capturing():
        return "the caller captures a graph of its own"
    return _unfit_cache(call.cache) or _unfit_arguments(given, text)


def _unfit_cache(cache: Any) -> str | None:
    if cache is None:
        return None
    if not isinstance(cache, Cache) or cache.offloading:
        return "an offloaded cache" if isinstance(cache, Cache) else f"a cache of {type(cache).__name__}"
    odd = [layer for layer in cache.layers if type(layer) not in (DynamicLayer, StaticLayer)]
    pruned = [layer for layer in odd if isinstance(layer, PrunedLayer)]
    if pruned:
        return "a cache that was pruned before"
    return f"a cache of {type(odd[0]).__name__}" if odd else None


def _unfit_arguments(given: Mapping[str, Any], text: Any) -> str | None:
    for name, x in given.items():
        if name not in GIVEN | SETTINGS and x is not None and x is not False:
            return f"{name} is asked for, or given"
    asked = [name for name in ASKS if getattr(text.config, name)]
    return f"{asked[0]} is asked for" if asked else None


def ends_with_image(unpruned: Unpruned) -> bool:
    """Whether some sample's last token is a visual one, as far as a stage reads where the text is."""
    words = () if unpruned.text is None else unpruned.text.words
    return any(n and not text for n, text in zip(unpruned.layout.counts, words, strict=False))

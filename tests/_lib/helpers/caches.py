"""Caches that need what is not there: offloading without a GPU, quantization without the packages of its backends."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import QuantizedLayer

from vlmprune.models.host import cache_layers


class Stream(nullcontext):
    """transformers' offloading uses CUDA streams whatever the device; without one there is nothing to wait for."""

    def wait_stream(self, other: Any) -> None:
        pass

    synchronize = nullcontext.__enter__


def without_streams(monkeypatch: Any) -> None:
    """Let transformers offload where there is no GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("torch.Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())


class Rounded(QuantizedLayer):
    """A stand-in for the integer backends, which need other packages: 16 bits, one scale."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax() / 32767
        return (tensor / scale).round().to(torch.int16), scale

    def _dequantize(self, q_tensor):
        return q_tensor[0] * q_tensor[1]


class PrunedRounded(cache_layers.PrunedLayer, Rounded):
    pass


def rounded_cache(monkeypatch: Any, config: Any, layers: int) -> DynamicCache:
    """A quantized cache of the residual-window kind; the window overflows while decoding."""
    monkeypatch.setitem(cache_layers.PRUNED, Rounded, PrunedRounded)
    cache = DynamicCache(config=config)
    cache.layers = [Rounded(residual_length=3) for _ in range(layers)]
    return cache

"""The same model cut to a policy's numbers of rows by slicing, with nothing scored or chosen: the ceiling of its speed-up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.models.host.parts import find_parts
from vlmprune.models.prompt import SecondWave

Hook = Callable[[Any, tuple[Tensor, ...], dict[str, Any]], Any]


def twin(model: Any) -> Any:
    """Another model on the same weights. ``model`` has no hooks."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def bare(model: Any, rows: dict[int, int], second: SecondWave | None = None) -> Any:
    """A twin in which only the last ``rows[i]`` rows enter layer i, those of a second wave after it has run as many."""
    made = twin(model)
    parts = find_parts(made)
    layers = parts.layers
    if second is not None:
        saving, joining = _second_wave(layers[: second.layer], second, parts.host.cache)
        layers[0].register_forward_pre_hook(saving, with_kwargs=True)
        layers[second.layer].register_forward_pre_hook(joining, with_kwargs=True)
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(_cutter(rows.get(i)), with_kwargs=True)
    return made


def _cutter(rows: int | None) -> Hook:
    def cutting(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if rows is None else args[0][:, -rows:].contiguous()
        rope = tuple(t[:, -hidden.shape[1] :] for t in kwargs["position_embeddings"])
        return (hidden, *args[1:]), kwargs | {"position_embeddings": rope, "position_ids": None}

    return cutting


def _second_wave(layers: Sequence[Any], second: SecondWave, cache: str) -> tuple[Hook, Hook]:
    """Hooks that keep the prompt's rows, and run the last of them over as many keys before they join the others."""
    prompt: list[Tensor] = []

    def saving(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        prompt[:] = [args[0]]

    def joining(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        rows = prompt[0][:, -second.width :]
        for kept in kwargs[cache].layers:
            if kept.is_initialized:  # which transformers 5.17 does not ask
                kept.crop(second.keys - second.width - args[0].shape[1])  # negative: so many from the end
        mask = torch.ones(len(rows), 1, second.width, second.keys, dtype=torch.bool)
        for layer in layers:
            rows = layer(rows, **kwargs | {"attention_mask": mask})
        return (torch.cat([args[0], rows], 1), *args[1:]), kwargs

    return saving, joining

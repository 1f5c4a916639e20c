"""Muon for matrices, Adam for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_ADAM_SHARE = 1 / 6  # learning rate of Adam's parameters against Muon's
_TABLES = ("embed", "lm_head")  # matrices whose rows stand for words or places: Adam
_DECODER = ("model.model.language_model.", "model.lm_head.")


class Single(TorchFunctionMode):
    """Inside it torch's Muon orthogonalizes in the dtype of its gradients, and not in bfloat16.

    On a CPU without instructions for bfloat16 those products take a hundred times as long as float32's: 17 of 21 seconds
    of a step.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].clone()  # as there: the caller works on it in place
        return func(*args, **(kwargs or {}))


def make_optimizers(
    parts: nn.ModuleDict, decoder_rate: float | None, reading: bool, frozen: tuple[str, ...] = ()
) -> tuple[tuple[torch.optim.Optimizer, ...], tuple[list[float], ...]]:
    """Muon for the matrices inside the blocks, Adam for everything else, and the share of the rate of each group.

    ``decoder_rate`` is a pretrained decoder's share of the rate (None: it is trained like the rest); ``reading`` trains the
    decoder alone; what begins with one of the names in ``frozen`` stays as it is.

    A pretrained decoder is Adam's: Muon costs more than the rest of a step where the matrices are large and the batch is
    small. Its table of words is left alone: Adam would move even the rows of words that never occur here. Who learns to
    read notes goes on seeing as before.
    """
    matrices: list[nn.Parameter] = []
    others: dict[float, list[nn.Parameter]] = {}  # by share
    for name, parameter in parts.named_parameters():
        table = any(word in name for word in _TABLES)
        decoder = name.startswith(_DECODER)
        pretrained = decoder_rate is not None and decoder
        share = decoder_rate if pretrained else 1.0
        if (pretrained and table) or (reading and not decoder) or name.startswith(frozen):
            share = 0.0
        parameter.requires_grad_(share > 0)
        if share == 0:
            continue
        if name.startswith("model.") and parameter.ndim == 2 and not (table or pretrained):
            matrices.append(parameter)
        else:
            others.setdefault(share, []).append(parameter)
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, momentum=0.95)
    groups = [{"params": some} for some in others.values()]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-10)
    return (muon, adam), ([1.0], [share * _ADAM_SHARE for share in others])

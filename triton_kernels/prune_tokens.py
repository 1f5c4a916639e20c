"""Score, select and gather in a row, with nothing waiting for the host.

Launches: row_lse where no log-sum-exp is given, score_select, select_columns where many columns compete, gather_tokens; the
last two where the scores are given.
"""

import torch

from vlmprune.triton_kernels._device import longest
from vlmprune.triton_kernels._launch import Program, recording
from vlmprune.triton_kernels._rows import layout
from vlmprune.triton_kernels.gather_tokens import gather_tokens
from vlmprune.triton_kernels.score_select import score
from vlmprune.triton_kernels.select_columns import Choice, select_columns


def prune_tokens(tensors, selection, s):
    """(gathered tensors, index, count, scores, kept, columns, cu_seqlens_out or None) of arguments that were checked."""
    B, packed = len(s.columns), s.cu_seqlens is not None
    columns, mask, positions = s.columns, s.key_mask, longest(s)
    rows = layout(tensors[0])[2] if tensors and not packed else positions
    if selection.at is not None:
        columns, mask = selection.at, selection.at_mask
        positions = rows = selection.reach(tensors)
    choice = Choice.of(selection, columns, mask, positions, rows, s.cu_seqlens)
    if B > 0:
        scores = score(s, choice)
    else:
        scores = torch.empty_like(s.columns, dtype=torch.float32)
        choice.clear()
    out = gather_tokens(tensors, choice.index)
    return out, choice.index, choice.count, scores, choice.kept, choice.places, choice.ends


def prune_scored(tensors, selection, scores, columns, key_mask, length):
    """(gathered tensors, index, count, kept, columns) of arguments that were checked."""
    choice = Choice.of(selection, columns, key_mask, length, length)
    if len(columns):
        select_columns(choice, scores.contiguous())
    return gather_tokens(tensors, choice.index), choice.index, choice.count, choice.kept, choice.places


LAUNCHERS = {run.__name__: run for run in (prune_tokens, prune_scored)}


def prune_plan(launcher, arguments, inputs):
    """(Program, outputs) of one of the launchers, recorded; a run exchanges ``inputs`` and outputs."""
    with recording() as recorded:
        tensors, *others = LAUNCHERS[launcher](*arguments)
    outputs = [*tensors, *[x for x in others if x is not None]]
    return Program(recorded, [*inputs, *outputs]), outputs

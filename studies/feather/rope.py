"""The effect of RoPE in the score, measured: on a LLaVA checkpoint with its questions, and on a text decoder without an image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from common.rows import Row, row
from torch import Tensor

from vlmprune.eval import Question
from vlmprune.eval.ask import batch_inputs, make_batches
from vlmprune.eval.intervals import bootstrap
from vlmprune.eval.oracle import patches_in
from vlmprune.models import find_parts
from vlmprune.policies.base import Grid

from .attention import centre, layer_scores, recall, top_share
from .heights import heights, thirds

BOTTOM, CENTRE, RECALL = "top quarter in the bottom third", "mean height of the score", "recall of the box"
UNBIASED = {BOTTOM: "", CENTRE: "0.5 is the middle", RECALL: "0.25 is chance"}
Values = dict[str, list[Tensor]]
"""Quantity -> per sample ``[layers, 2]``, with and without RoPE."""


@torch.inference_mode()
def question_values(
    model: Any, processor: Any, questions: Sequence[Question], grid: Grid, batch_size: int
) -> Values:
    """Where the last prompt row looks, with and without RoPE, at every layer, on questions with a box."""
    values: Values = {BOTTOM: [], CENTRE: [], RECALL: []}
    parts = find_parts(model)
    for batch in make_batches(processor, questions, batch_size):
        inputs = batch_inputs(processor, batch).to(model.device, dtype=model.dtype)
        hidden = model(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        visual = inputs["input_ids"] == parts.config.image_token_id
        columns = visual.nonzero()[:, 1].view(len(batch), -1)
        boxes = torch.zeros(columns.shape, dtype=torch.bool)
        for marked, question in zip(boxes, batch, strict=True):
            assert question.region is not None
            marked[patches_in(question.region, grid)] = True
        scores = layer_scores(parts.text, hidden, columns, inputs["attention_mask"].bool())
        for quantity, found in measure(scores, grid, boxes.to(columns.device)).items():
            values[quantity] += found
    return values


def measure(
    scores: Iterable[tuple[Tensor, Tensor]], grid: Grid, boxes: Tensor | None = None
) -> dict[str, Tensor]:
    """Each quantity ``[B, layers, 2]`` from the scores of every layer, with and without RoPE."""
    out: dict[str, list[Tensor]] = {BOTTOM: [], CENTRE: []} | ({} if boxes is None else {RECALL: []})
    for pair in scores:
        device = pair[0].device
        low = torch.from_numpy(thirds(grid)["bottom third"]).to(device)
        height = torch.from_numpy(heights(grid)).float().to(device)
        out[BOTTOM].append(torch.stack([top_share(s, low) for s in pair], 1))
        out[CENTRE].append(torch.stack([centre(s, height) for s in pair], 1))
        if boxes is not None:
            out[RECALL].append(torch.stack([recall(s, boxes) for s in pair], 1))
    return {quantity: torch.stack(layers, 1).cpu() for quantity, layers in out.items()}


def rope_rows(model: str, values: Values, grid: Grid) -> Iterator[Row]:
    """Per layer and quantity: with RoPE, without, and the difference with minus without, sample by sample."""
    low = f"{float(np.mean(thirds(grid)['bottom third'])):.4f} of all patches"
    for quantity, samples in values.items():
        table = torch.stack(samples).double()  # [samples, layers, 2]
        for layer in range(table.shape[1]):
            with_rope, without = table[:, layer].unbind(1)
            each = {"with RoPE": with_rope, "without": without, "difference": with_rope - without}
            for method, some in each.items():
                yield row(
                    bootstrap(some.tolist()),
                    len(some),
                    model=model,
                    part="rope",
                    method=method,
                    quantity=quantity,
                    layer=layer,
                    note=UNBIASED[quantity] or low,
                )

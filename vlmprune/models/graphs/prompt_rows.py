"""A prompt's rows as a graph has them, and back: there every sample begins on the left, whatever its padding here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune import ops
from vlmprune.constants import counting, whole_numbers
from vlmprune.models.graphs.store import Inputs
from vlmprune.models.layout import Layout, inverse, take, where_true


class PromptRows:
    """Where the rows of one prompt are among a graph's.

    Args:
        layout: the prompt before any stage.
        length: rows of the graph, L.

    Attributes:
        rows: ``[B, L]`` position in the prompt of each row of the graph, -1 = padding.
    """

    def __init__(self, layout: Layout, length: int) -> None:
        self.layout, self.batch, self.device = layout, len(layout.counts), layout.visual.device
        if layout.valid is None:
            rows = counting(self.batch, layout.length, self.device)
        else:
            rows = where_true(layout.valid, max(layout.real))
        self.rows = pad(rows, (0, length - rows.shape[1]), value=-1)

    def fill(self, into: Inputs, prompt: Inputs) -> None:
        """Write what the prompt brings into a graph's inputs."""
        made = ops.gather_tokens(prompt.by_row(), self.rows)
        torch._foreach_copy_(into.every(), [self.rows, *made, *prompt.whole()])

    def unpruned(self) -> Tensor:
        """``[B, S]`` the graph's row of every position of the prompt, -1 = padding."""
        if self.layout.valid is None:
            return counting(self.batch, self.layout.length, self.device)
        return inverse(self.rows, self.layout.length)

    def shortened(self, before: Layout, after: Layout) -> tuple[Layout, Tensor]:
        """What a stage has left of the prompt, padded on the left as ever, and the graph's row ``[B, n]`` of each row.

        Args:
            before: the layout that entered the stage.
            after: the graph's layout behind it.
        """
        kept = after.counts
        real = tuple(r - c + k for r, c, k in zip(before.real, before.counts, kept, strict=True))
        length, full = max(real), min(real) == max(real)
        at, visual = counting(self.batch, length, self.device), after.visual.clone()
        if not full:
            blanks = whole_numbers(tuple(length - n for n in real), self.device)[:, None]
            at = (at - blanks).clamp(min=-1)
            visual = torch.where(visual >= 0, visual + blanks, -1)
        assert after.origin is not None and after.before is not None
        origin = take(after.origin, at)
        new = Layout(
            length=length,
            visual=visual,
            counts=kept,
            real=real,
            valid=None if full else at >= 0,
            origin=origin if self.layout.valid is None else take(self.rows, origin),
            before=(before, after.before[1].clone()),
            ordered=after.ordered,
        )
        return new, at

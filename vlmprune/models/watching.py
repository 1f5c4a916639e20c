"""What the visual tokens receive from the rows of a whole answer, at every layer: no attention matrix, any backend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vlmprune.errors import ModelError, check, require
from vlmprune.models.decoder_reads import read_rows
from vlmprune.models.host.cache_view import held_keys
from vlmprune.models.host.parts import find_parts
from vlmprune.models.layout import moved
from vlmprune.models.prefill import RUNNING, Prefill
from vlmprune.models.scope import meter
from vlmprune.models.unpruned import Unpruned
from vlmprune.policies.base import Grid


class Received(NamedTuple):
    """What a prompt's visual tokens received.

    Attributes:
        scores: ``[B, N]`` float32, in prompt order, 0 at padding.
        grids: per sample, the grids of its visual tokens, as a ``TokenContext`` has them.
        sizes: per sample, the visual tokens of each of its images.
        steps: decode steps that were counted.
    """

    scores: Tensor
    grids: tuple[tuple[Grid, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    steps: int


class _Step(NamedTuple):
    """One call under way.

    Attributes:
        first: the first of its own rows that is read.
        rows: ``[B, R]`` int64 key positions of the rows from there on, -1 = does not count.
        length: key positions there are.
    """

    first: int
    rows: Tensor
    length: int


class Watch(AbstractContextManager["Watch"]):
    """A block in which one prompt is answered, and all that its visual tokens receive is summed.

    Summed over layers, heads and rows: those of the prompt from its last visual token on, and those of the answer. That is
    the importance of SGL's released code (arXiv 2412.03324); each row's softmax spans all it sees, nothing is normalised.
    Query and key are taken from the model's own projections and cache, by hooks on this instance that are gone at the end.
    The block is one prompt's, in one thread: what it counts stands here, not on the model.

    Args:
        model: as for ``prune``; answers greedily, with a cache, and a prompt in one call.
        ends: token ids that end an answer: what a batch goes on to feed behind one counts for nothing.

    Raises:
        ModelError: as ``meter``; in the block, a prompt in several calls, behind another, padded on the right, or without a
            cache; a call of the text model alone.
        InputError: a policy is attached to the model; embeddings without a sign of where visual tokens are.
    """

    def __init__(self, model: nn.Module, ends: Sequence[int] = ()) -> None:
        self.parts, self.scope, self.ends = find_parts(model), meter(model), ends
        self.cache: Any = None
        self.fed: Tensor | None = None
        self.unpruned: Unpruned | None = None
        self.step = _Step(0, torch.empty(0), 0)
        self.steps = 0
        self.scores = self.columns = torch.empty(0)
        self.valid: Tensor | None = None
        self.alive = self.stops = torch.empty(0)

    def __enter__(self) -> Self:
        """Hook the model."""
        after, hooked = self._after_attention, {"with_kwargs": True}
        with ExitStack() as stack:
            self.run = stack.enter_context(self.scope)
            handles = [self.parts.base.register_forward_pre_hook(self._before_base, **hooked)]
            handles += [layer.self_attn.register_forward_hook(after, **hooked) for layer in self.parts.layers]
            for handle in handles:
                stack.callback(handle.remove)
            self.hooks = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Take the hooks off."""
        self.hooks.__exit__(*error)

    def received(self) -> Received:
        """What was counted so far. Raises ModelError where no prompt was answered."""
        if self.cache is None:
            raise ModelError("model: expected a prompt answered inside the block, got none")
        seen = self.unpruned
        none: tuple[tuple[Any, ...], ...] = ((),) * len(self.alive)
        grids, sizes = (none, none) if seen is None else (seen.grids, seen.sizes)
        return Received(self.scores, grids, sizes, self.steps)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_base(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.fed = self.parts.host.arguments(args, kwargs).ids

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_attention(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        told = self.parts.host.told
        prefill: Prefill | None = kwargs.get(RUNNING)  # our own keyword
        if prefill is None:
            raise ModelError(
                "model: expected to be called as a whole in the block, got a call of its text model"
            )
        hidden, cache = told(kwargs, "hidden_states"), told(kwargs, self.parts.host.cache)
        if module.layer_idx == 0:
            if prefill.call.decodes:
                self._decodes(hidden, cache)
            else:
                self._begins(prefill, told(kwargs, "attention_mask"), hidden, cache)
        first, rows, length = self.step
        if not self.columns.shape[1] or not rows.shape[1]:
            return
        cos, sin = told(kwargs, "position_embeddings")
        key = held_keys(cache.layers[module.layer_idx], length, hidden.device)
        rows, columns, valid = moved((rows, self.columns, self.valid), hidden.device)
        tables = cos[:, first:], sin[:, first:]
        read = read_rows(module, hidden[:, first:], tables, key, rows, columns, valid, prefill.wants)
        self.scores += read.received(head_reduce="sum", row_reduce="sum").to(self.scores.device)

    def _begins(self, prefill: Prefill, mask: object, hidden: Tensor, cache: Any) -> None:
        """The prompt: which of its rows count, and where its visual tokens are. One host read, with padding two."""
        call = prefill.call
        alone = self.cache is None and call.past == 0 and not call.tail
        if not alone or cache is None or (call.visuals is not None and call.visuals.cut):
            got = "none" if cache is None else "another, or a part of one"
            raise ModelError(f"prompt: expected one in a block, in one call, to fill a cache, got {got}")
        self.cache, device = cache, hidden.device
        self.stops = torch.tensor([*self.ends], dtype=torch.int64, device=device)
        self.alive = torch.ones(call.batch, 1, dtype=torch.bool, device=device)
        self.scores = torch.zeros(call.batch, 0, device=device)
        self.columns, self.step = self.scores.long(), _Step(0, self.scores.long(), call.length)
        found = self.fed is not None or call.visuals is not None
        check(found, "inputs_embeds", "input_ids or images with it", "neither: no way to find visual tokens")
        if call.visual is None:
            return
        prefill.open(mask, hidden)
        self.unpruned = prefill.unpruned
        assert self.unpruned is not None
        layout = self.unpruned.layout
        order, valid = torch.arange(call.length, device=device), layout.valid
        last = layout.visual.amax(1, keepdim=True)
        counted = (order >= last) & (last >= 0)
        if valid is not None:
            self.valid = valid = valid.to(device)
            counted = counted & valid
            if not valid[:, -1].all():
                raise ModelError(
                    "prompt: expected padding on the left, to answer from, got some on the right"
                )
        first = int(torch.where(counted, order, call.length).min())
        self.columns = layout.visual
        self.scores = torch.zeros(layout.visual.shape, device=device)
        self.step = _Step(first, torch.where(counted, order, -1)[:, first:], call.length)

    def _decodes(self, hidden: Tensor, cache: Any) -> None:
        """One more token of every sample whose answer goes on."""
        if self.cache is None or cache is not self.cache:
            raise ModelError("prompt: expected one in a block, got a step of another")
        fed = require(self.fed, "input_ids", "token ids at every step")
        length, self.steps = self.step.length + 1, self.steps + 1
        self.alive = self.alive & ~torch.isin(fed.to(self.stops.device), self.stops)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, torch.ones_like(self.valid[:, :1])], 1)
        self.step = _Step(0, torch.where(self.alive, length - 1, -1), length)

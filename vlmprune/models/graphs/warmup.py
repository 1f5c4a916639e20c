"""Captures prefills before the first prompt comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import check
from vlmprune.models.graphs.store import Graphs
from vlmprune.models.host.parts import Parts, find_parts, patch_grid
from vlmprune.models.scope import prune
from vlmprune.policies.base import PruningPolicy, tokens_in

TIMES = 2
"""Prompts of a shape until it is captured."""
RGB = 3


def warmup(
    model: nn.Module,
    policy: PruningPolicy,
    lengths: Sequence[int],
    like: Mapping[str, Any] | None = None,
    batch: int = 1,
    graphs: Graphs | None = None,
) -> Graphs:
    """Capture the prefills of prompts of these lengths, for ``prune(model, policy, graphs=...)``.

    Prompts whose text is about as long and whose images are alike share a graph: lengths 16 tokens apart cover all between
    them. Nothing is captured where nothing could be replayed (no GPU, a choice whose size is data): ``run.report().graph``
    then says why.

    Args:
        model, policy: as for ``prune``.
        lengths: of the prompts, in tokens, those of the images included.
        like: a prompt of one sample with the images to come, as the processor gives it; its text behind the last image is cut
            or repeated. None (default) = one image, for models whose images are all cut to one size.
        batch: samples of each.
        graphs: where they are kept; None = a new ``Graphs``.

    Returns:
        The graphs.

    Raises:
        InputError: a length has no room for the images and a token behind them; ``like`` is needed, or of several samples.
        ModelError: the model cannot be pruned.

    Example, on a machine without a GPU:
        >>> from vlmprune import FastV, warmup
        >>> len(warmup(model, FastV(keep=4), lengths=(32, 48)))
        0
    """
    parts = find_parts(model)
    prompt = _one_image(parts) if like is None else {**like}
    ids = prompt["input_ids"]
    check(ids.shape[0] == 1, "like", "a prompt of one sample", f"{ids.shape[0]}")
    check(isinstance(batch, int) and batch > 0, "batch", "a whole number > 0", repr(batch))
    visual = torch.isin(ids[0], torch.tensor([*parts.token_ids.values()], device=ids.device))
    check(bool(visual.any()), "like", "a prompt with an image", "none")
    end = int(visual.nonzero().max()) + 1
    check(end < ids.shape[1], "like", "text behind the last image", "none")
    for length in lengths:
        ok = isinstance(length, int) and length > end
        check(
            ok,
            "lengths",
            f"whole numbers above {end} (the images, and what stands before them)",
            repr(length),
        )
    graphs = Graphs() if graphs is None else graphs
    with prune(model, policy, graphs):
        for length in lengths:
            inputs = {name: _fitted(x, ids, end, length, batch) for name, x in prompt.items()}
            for _ in range(TIMES):
                parts.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return graphs


def _fitted(x: Any, ids: Tensor, end: int, length: int, batch: int) -> Any:
    """One of a prompt's inputs for a prompt of this length; what has an entry for each token is repeated at its last one."""
    if not isinstance(x, Tensor):
        return x
    if x.shape == ids.shape:
        tail = x[:, end:length]
        x = torch.cat([x[:, :end], tail, tail[:, -1:].expand(-1, length - end - tail.shape[1])], 1)
    return torch.cat([x] * batch)


def _one_image(parts: Parts) -> dict[str, Tensor]:
    """A prompt of one image and a token on either side. Raises InputError where images differ in shape."""
    family, vision = parts.family, parts.config.vision_config
    fixed = family.square and parts.tower.padding is None
    check(
        fixed,
        "like",
        f"a prompt with the images to come ({parts.config.model_type!r} has them in many shapes)",
        "None",
    )
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    seen = [parts.token_ids["image"]] * tokens_in([patch_grid(parts.config)])
    device, dtype = parts.text.device, parts.text.dtype
    ids = torch.tensor([[0, *seen, 0]], device=device)
    pixels = torch.zeros(1, RGB, height, width, device=device, dtype=dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

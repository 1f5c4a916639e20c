"""``rectify=True``: how many tokens each row that a stage leaves stands for, by whose log its attention logits then rise.

Softmax over few keys gives each more weight than it had among many, and the text gains what the image has lost. A token
that stands for m has log m added to every logit it receives, as if it were there m times: proportional attention (ToMe,
Bolya et al. 2023, arXiv 2210.09461) inside the language model, as ERA has it (arXiv 2606.31982). A reading: who stands for
whom is not published in full. Here every token that goes is stood for by the one of its sample that stays, as it is behind
the stage, whose hidden state is closest to its own by cosine; unless the method says which token it was merged into.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmprune import ops
from vlmprune.models.layout import inverse, put, take
from vlmprune.models.prefill import Decision, Entering


@torch.no_grad()
def stood_for(entering: Entering, made: Decision, short: Tensor, earlier: Decision | None) -> Tensor | None:
    """How many visual tokens of the prompt each row stands for, ``[B, n]`` float32, 1 at text; None without any.

    No host read. All pairs of a token that enters and one that stays are compared.

    Args:
        entering: what entered the stage.
        made: what it decided.
        short: ``[B, n, D]`` the rows it left.
        earlier: the decision before it: what stood for several tokens already counts as so many.
    """
    assert made.layout.before is not None
    before, numbers = made.layout.before
    places = made.layout.visual
    if numbers.shape[1] == 0:
        return None
    old = before.visual
    count = torch.where(old >= 0, 1.0, 0.0)
    if earlier is not None and earlier.weights is not None:
        count = take(earlier.weights.to(old.device), old).clamp(min=0)
    one, other = ops.gather_tokens([entering.hidden], old)[0], ops.gather_tokens([short], places)[0]
    # what is broken is like nothing, and so takes no other token's place
    likeness = (F.normalize(one.float(), dim=2) @ F.normalize(other.float(), dim=2).mT).nan_to_num(-1.0)
    closest = likeness.masked_fill(places[:, None] < 0, -torch.inf).argmax(2)
    order = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
    if made.merged is not None:
        said = take(inverse(numbers, old.shape[1]), made.merged.to(old.device))
        closest = torch.where(said >= 0, said, closest)
    closest = put(closest, numbers, order)  # who stays stands for itself
    sums = torch.zeros_like(numbers, dtype=torch.float32).scatter_add_(1, closest, count)
    return put(torch.ones(short.shape[:2], device=short.device), places, sums)

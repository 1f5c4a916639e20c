"""Attention that patches receive from all rows, and its logits, by matrices in double precision."""

from dataclasses import replace

import pytest
import torch

from helpers.contexts import sight
from vlmprune.policies.parts.received import received_from_all, received_logits


def layer(cls):
    """One of two crops of 12 patches."""
    return sight([((3, 4), (4, 3))], cls=cls).vision[-2]


def logits_of(seen):
    return seen.query.double() @ seen.key.double().mT * seen.scale


@pytest.mark.parametrize("cls", [True, False])
def test_whole_crops(cls):
    seen = layer(cls)
    logits = logits_of(seen).mean(1)
    paid = logits_of(seen).softmax(-1).mean((1, 2))[:, int(cls) :]
    torch.testing.assert_close(received_from_all(seen), paid.float())
    wanted = logits[:, 0, 1:] if cls else logits.mean(1)
    torch.testing.assert_close(received_logits(seen), wanted.float())


def test_windows():
    """Rows of another window pay nothing, and have no logits; all of the crop's are counted."""
    whole = layer(False)
    query, key = (x.unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1) for x in (whole.query, whole.key))
    cells, rows = torch.arange(24).view(2, 12, 1), torch.full((2, 1), 12.0)
    seen = replace(whole, query=query, key=key, cells=cells, rows=rows)
    paid = logits_of(seen).softmax(-1).mean(1).sum(1).view(2, 12) / 12
    torch.testing.assert_close(received_from_all(seen), paid.float())
    logits = logits_of(seen).mean(1).sum(1).view(2, 12) / 12
    torch.testing.assert_close(received_logits(seen), logits.float())

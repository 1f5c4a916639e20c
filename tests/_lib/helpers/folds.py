"""Rounds of bipartite matching written out token by token, in double precision."""

import math
from dataclasses import replace

import numpy as np
import torch

from helpers.contexts import images_in, sight


def projected_sight(images, **settings):
    """A context at layer 0 whose hidden states are the tower's features, projected."""
    ctx = sight(images, **settings)
    hidden = torch.zeros_like(ctx.hidden)
    for sample, here in enumerate(images_in(ctx)):
        for number, first, (rows, columns) in here:
            hidden[sample, first : first + rows * columns] = ctx.project(ctx.features[number])
    return replace(ctx, hidden=hidden)


def cosine(a, b):
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / length) if length else 0.0


class Token:
    """What is left of some tokens of a crop: where it stands, what is compared and merged, how many tokens it is."""

    def __init__(self, place, metric, row, penalty):
        self.place, self.metric, self.row, self.penalty = place, metric, row, penalty
        self.size, self.members = 1, [place]

    def absorb(self, others, weighted):
        """The mean of this one and the others, by how many tokens they are or as if each were one."""
        all_of = [self, *others]
        weight = [t.size if weighted else 1 for t in all_of]
        self.metric = np.average([t.metric for t in all_of], 0, weight)
        self.row = np.average([t.row for t in all_of], 0, weight)
        self.penalty = np.mean([t.penalty for t in all_of])
        self.size, self.members = sum(t.size for t in all_of), [m for t in all_of for m in t.members]


def fold_slowly(metric, rows, keep, *, first=1, spare=0, weighted=False, penalty=None, least=1):
    """The tokens that stay, ascending. ``first``: the first destination; ``spare``: (n - spare) // 2 merge, at least one, and
    at most one of ``least`` equal parts of all that go.
    """
    part = math.ceil((len(rows) - keep) / least)
    penalty = [0.0] * len(rows) if penalty is None else penalty
    tokens = [Token(*parts) for parts in zip(range(len(rows)), metric, rows, penalty, strict=True)]
    while len(tokens) > keep:
        turns = [tokens[first::2], tokens[1 - first :: 2]]
        best = []
        for number, source in enumerate(turns[1]):
            alike = [round(cosine(source.metric, target.metric), 6) for target in turns[0]]
            nearest = alike.index(max(alike))
            best.append((-(max(alike) - source.penalty), number, source, turns[0][nearest]))
        most = min(len(tokens) - keep, part, max(1, (len(tokens) - spare) // 2))
        going = sorted(best, key=lambda pair: (round(pair[0], 5), pair[1]))[:most]
        for target in turns[0]:
            target.absorb([source for *_, source, at in going if at is target], weighted)
        gone = {id(source) for *_, source, _ in going}
        tokens = [token for token in tokens if id(token) not in gone]
    return tokens


def assert_folded(got, sample, expected, finish=lambda token: token.row, atol=1e-5):
    """That a Reduction has these tokens ``(first place of their crop, Token)`` in one of its samples, in this order."""
    kept = [first + token.place for first, token in expected]
    assert got.index[sample].tolist() == kept + [-1] * (got.index.shape[1] - len(kept))
    for row, (_, token) in zip(got.hidden[sample].double().cpu().numpy(), expected, strict=False):
        np.testing.assert_allclose(row, finish(token), atol=atol)
    into = {}
    for first, token in expected:
        into |= {first + member: first + token.place for member in token.members if member != token.place}
    wanted = [into.get(place, -1) for place in range(got.merged.shape[1])]
    assert got.merged[sample].tolist() == wanted

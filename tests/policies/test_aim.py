"""AIM against its formulas written out: rounds of plain means, PageRank over all rows, the straight decay."""

from dataclasses import replace
from weakref import WeakValueDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.contexts import case, images_in
from helpers.folds import assert_folded, fold_slowly, projected_sight
from vlmprune.policies import AIM
from vlmprune.policies.base import Needs
from vlmprune.policies.counts import keep_count
from vlmprune.policies.parts.page_rank import page_rank


@pytest.mark.parametrize("keep", [25, 0.25, 1, 1000])
@pytest.mark.parametrize("positions", ["pack", "keep"])
def test_merges_projected_rows(keep, positions):
    ctx = case(["square", "none", "two"], layer=0, seed=2).ctx
    got = AIM(keep=keep, positions=positions).select(ctx)
    assert got.positions == positions
    for sample, here in enumerate(images_in(ctx)):
        found = []
        for _, first, (rows, columns) in here:
            own = ctx.hidden[sample, first : first + rows * columns].double().cpu().numpy()
            found += [(first, token) for token in fold_slowly(own, own, keep_count(keep, len(own)))]
        assert_folded(got, sample, found)


@pytest.mark.parametrize("cls", [True, False])
def test_merges_features_by_keys(cls):
    """All heads side by side are one key; the result is projected. CLS moves no turns."""
    ctx = projected_sight(["tall", "none", ((3, 7), (7, 3))], layers=(-1,), cls=cls)
    got = AIM(keep=7, features="keys", positions="pack").select(ctx)
    for sample, here in enumerate(images_in(ctx)):
        found = []
        for number, first, _ in here:
            keys = torch.cat([head[int(cls) :] for head in ctx.vision[-1].key[number]], 1).double().cpu()
            features = ctx.features[number].double().cpu().numpy()
            found += [(first, token) for token in fold_slowly(keys.numpy(), features, 7)]
        assert_folded(
            got, sample, found, lambda t: ctx.project(torch.from_numpy(t.row)).double().cpu().numpy()
        )


def slow_rank(made, sample, temperature, rounds):
    """Plain loops in double precision: what every column of the chunk holds after the last step."""
    seen = made.ctx.attention
    S, Sq = seen.key.shape[2], seen.query.shape[2]
    rows = [j for j in range(S - Sq, S) if made.valid[sample, j]]
    squares = [0.0] * S
    heads, shared = seen.query.shape[1], seen.query.shape[1] // seen.key.shape[1]
    for h in range(heads):
        keys = seen.key[sample, h // shared].double()
        pays = {}
        for i in rows:
            sees = [j for j in range(i + 1) if made.valid[sample, j]]
            logits = keys[sees] @ seen.query[sample, h, i - (S - Sq)].double() * seen.scale / temperature
            pays[i] = dict(zip(sees, logits.softmax(0).tolist(), strict=True))
        rank = {i: 1 / len(rows) for i in rows}
        for _ in range(rounds):
            new = dict.fromkeys(range(S), 0.0)
            for i in rows:
                for j, share in pays[i].items():
                    new[j] += rank[i] * share
            rank = new
        squares = [s + rank[j] ** 2 / heads for j, s in enumerate(squares)]
    return [squares[c] ** 0.5 for c in seen.columns[sample].tolist() if c >= 0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"past": True}, {"kept": [[0, 3, 7], None, [1, 2, 30]]}, {"few_values": True}],
    ids=["plain", "past", "thinned", "ties"],
)
@pytest.mark.parametrize("temperature, rounds", [(0.1, 5), (1.0, 1)])
def test_page_rank(settings, temperature, rounds):
    made = case(["square", "none", "two"], **settings)
    got = page_rank(made.ctx.attention, temperature, rounds)
    for sample, n in enumerate(made.ctx.counts):
        wanted = slow_rank(made, sample, temperature, rounds)
        assert got[sample, :n].tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-9)


def test_page_rank_keeps_what_there_is():
    """Before heads are joined the ranks of all rows add up to 1; one head says so."""
    made = case(["square"], H=2)
    seen = made.ctx.attention
    one = replace(
        seen, query=seen.query[:, :1], key=seen.key[:, :1], columns=torch.arange(seen.key.shape[2])[None]
    )
    assert page_rank(one, 0.1, 5).sum().item() == pytest.approx(1.0)


def test_padding_may_hold_anything():
    made = case(["square", "tall"])
    seen = made.ctx.attention
    gone = ~seen.key_mask
    dirty = replace(
        seen,
        query=seen.query.masked_fill(gone[:, None, -seen.query.shape[2] :, None], float("nan")),
        key=seen.key.masked_fill(gone[:, None, :, None], float("nan")),
    )
    assert gone.any()
    clean, got = (page_rank(x, 0.1, 5).masked_fill(~made.ctx.mask, 0) for x in (seen, dirty))
    assert torch.equal(clean, got)


class Maps(TorchDispatchMode):
    """Counts how many float maps of one shape are held at once."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.held, self.most = numel, WeakValueDictionary(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() == self.numel:
            storage = out.untyped_storage()
            self.held[storage._cdata] = storage
            self.most = max(self.most, len(self.held))
        return out


def test_page_rank_holds_the_map_of_one_key_head_twice():
    seen = case(["square", "two"], H=6).ctx.attention
    B, H, S, _ = seen.query.shape
    with Maps(B * H // seen.key.shape[1] * S * S) as maps:
        page_rank(seen, 0.1, 5)
    assert maps.most == 2


def test_drops_the_lowest_ranks():
    made = case(["square", "two"], layer=3)
    policy = AIM(layer=3, stages=4, positions="pack")
    kept = [27, 26]  # three quarters of 36 and of 35
    ranks = page_rank(made.ctx.attention, 0.1, 5)
    for sample, index in enumerate(policy.select(made.ctx).tolist()):
        best = ranks[sample, : made.ctx.counts[sample]].topk(kept[sample]).indices.sort().values
        assert [i for i in index if i >= 0] == best.tolist()


def test_the_decay():
    """The released schedules: from 252 of LLaVA-1.5 and 196 // 4 * 32 of a video's 32 frames."""
    policy = AIM(keep=252, positions="pack")
    assert policy.layers == (0, 14, 15, 16, 17, 18, 19, 20, 21)
    for n in (252, 1568):
        left, counts = n, []
        for layer in policy.layers[1:]:
            left = policy.kept(left, 1, layer)
            counts.append(left)
        released = [int(n * (1 - stage / 8)) for stage in range(1, 8)]
        assert all(abs(a - b) <= 1 for a, b in zip(counts, released, strict=False)), counts
        assert counts[-1] == 1
    assert policy.kept(576, 1, 0) == 252 and AIM(positions="pack").kept(0, 0, 14) == 0


def test_never_far_from_the_released_counts():
    policy, off = AIM(positions="pack"), set()
    for n in range(1, 3000):
        left = n
        for stage, layer in enumerate(policy.layers[1:-1], 1):
            left = policy.kept(left, 1, layer)
            off.add(abs(left - max(1, int(n * (1 - stage / 8)))))
    assert max(off) == 2


def test_the_last_share():
    policy = AIM(layer=2, stages=2, last=0.5, positions="pack")
    assert [policy.kept(100, 1, 2), policy.kept(75, 1, 3)] == [75, 50]
    assert AIM(positions="pack").at(0.4) == AIM(keep=0.4, last=0.4, positions="pack")


def test_needs():
    assert AIM(positions="pack").needs(0) == Needs(hidden=True)
    assert AIM(features="keys", positions="pack").needs(0) == Needs(hidden=True, vision=(-1,))
    assert AIM(positions="pack").needs(14) == Needs(attention="previous", rows="all")


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"keep": 0.0},
            "keep: expected a share in (0, 1] or a whole number of tokens per image >= 1, got 0.0",
        ),
        ({"features": "values"}, "features: expected 'projected' or 'keys', got 'values'"),
        ({"layer": 0}, "layer: expected a whole number >= 1 (the score comes from the layer before), got 0"),
        ({"stages": 0}, "stages: expected a whole number >= 1, got 0"),
        ({"last": 2}, "last: expected a share in [0, 1], got 2"),
        ({"temperature": 0}, "temperature: expected a number > 0, got 0"),
        ({"rounds": 0}, "rounds: expected a whole number >= 1, got 0"),
        ({"vision_layer": None}, "vision_layer: expected a whole number, got None"),
        ({"positions": "own"}, "positions: expected 'keep' or 'pack', got 'own'"),
    ],
)
def test_settings(settings, said):
    with pytest.raises(ValueError) as error:
        AIM(**settings)
    assert str(error.value) == said

"""FlowCut against its rule in loops and double precision: scores layer by layer, cuts at every second one, among what is left."""

import math
from dataclasses import replace

import pytest
import torch

from helpers.contexts import images_in, kept_lists, named, sight, top
from vlmprune.policies import FlowCut, Needs
from vlmprune.policies.base import Reduction

FIVE = ((4, 5),)
CASES = [
    pytest.param({"images": ["square"]}, id="one-image"),
    pytest.param({"images": [((4, 5), (4, 5)), (), FIVE]}, id="ragged"),
    pytest.param({"images": [FIVE, ((4, 5), (4, 5))], "cls": False}, id="no-cls"),
    pytest.param({"images": [FIVE, FIVE], "side": 2}, id="blocks"),
    pytest.param({"images": [FIVE], "side": 2, "cls": False}, id="blocks-no-cls"),
    pytest.param({"images": [FIVE, FIVE], "few_values": True}, id="ties"),
    pytest.param({"images": [((1, 1),)]}, id="one-token"),
]


def softmax(row):
    highest = max(row)
    e = [math.exp(x - highest) for x in row]
    return [x / sum(e) for x in e]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def slow_flow(seen, image):
    """Per head the attention and the likeness of CLS: of itself, and of every token; and the values' norms. Patches."""
    q, k, v = (x[image].double().tolist() for x in (seen.query, seen.key, seen.value))
    heads = range(len(q))
    first = int(seen.cls)
    norms = [
        sum(abs(sum(v[h][j][d] for h in heads) / len(q)) for d in range(len(v[0][0])))
        for j in range(first, len(v[0]))
    ]
    if not first:
        every = [softmax([dot(row, key) * seen.scale for key in k[h]]) for h in heads for row in q[h]]
        return [mean(every)], None, norms
    relation = [softmax([dot(q[h][0], key) * seen.scale for key in k[h]]) for h in heads]
    semantic = [softmax([dot(v[h][0], value) for value in v[h]]) for h in heads]
    return relation, semantic, norms


def per_token(values, seen, image):
    """Mean over each token's patches."""
    if seen.cells is None:
        return values
    P = len(values)
    return [mean([[values[c - image * P]] for c in cell])[0] for cell in seen.cells[image].tolist()]


def share(heads, left, seen, image):
    """The head mean of what CLS and those left share out, over the sum of those left."""
    parts, total = (1 if seen.cells is None else seen.cells.shape[2]), [0.0] * len(left)
    for row in heads:
        tokens = per_token(row[int(seen.cls) :], seen, image)
        own = row[0] if seen.cls else 0.0
        among = own + parts * sum(x for x, there in zip(tokens, left, strict=True) if there)
        total = [t + (x / among if there else 0.0) for t, x, there in zip(total, tokens, left, strict=True)]
    return [t / sum(total) for t in total]


def slow_choice(ctx, layers, image, n, k):
    left, score = [True] * n, None
    for at, layer in enumerate(layers):
        seen, ahead = ctx.vision[layer], len(layers) - 1 - at
        relation, semantic, norms = slow_flow(seen, image)
        a = share(relation, left, seen, image)
        b = [0.0] * n if semantic is None else share(semantic, left, seen, image)
        norms = per_token(norms, seen, image)
        here = [(x + y) * z for x, y, z in zip(a, b, norms, strict=True)]
        score = here if score is None else [0.5 * s + 0.5 * h for s, h in zip(score, here, strict=True)]
        if ahead % 2:
            continue
        m = sum(left)
        H = -sum(x * math.log(x) for x in a if x > 0) / math.log(m) if m > 1 else 1.0
        gone = round((m - k) / ahead**0.5 * (1 - H * H)) if ahead else m - k
        stays = max(m - gone, k)
        order = [round(s, 9) if there else -1.0 for s, there in zip(score, left, strict=True)]
        best = set(top(order, stays))
        left = [j in best for j in range(n)]
    return [j for j in range(n) if left[j]]


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("layers", [(0,), (0, 1), (2, 5, 7, 9, 10)], ids=str)
@pytest.mark.parametrize("keep", [3, 0.4])
def test_equals_the_rule(settings, layers, keep):
    images = named(settings["images"])
    more = {name: value for name, value in settings.items() if name != "images"}
    ctx = sight(images, layers, **more)
    policy = FlowCut(keep=keep, vision_layers=layers)
    got = kept_lists(policy.select(ctx))
    for sample, mine in enumerate(images_in(ctx)):
        expected = []
        for number, first, (rows, columns) in mine:
            n = rows * columns
            k = min(n, max(1, int(keep * n + 1e-6) if isinstance(keep, float) else keep))
            expected += [first + j for j in slow_choice(ctx, layers, number, n, k)]
        if settings.get("few_values"):  # an ulp may tell equal tokens apart
            assert len(got[sample]) == len(expected)
        else:
            assert got[sample] == expected


def test_cuts_on_the_way_matter():
    """What goes at a shallow layer does not come back, though the deep ones would have kept it."""
    ctx = sight(["square"], (0, 1, 2, 3, 4))
    cut = FlowCut(keep=6, vision_layers=(0, 1, 2, 3, 4)).select(ctx)
    last = FlowCut(keep=6, vision_layers=(4,)).select(ctx)
    assert not torch.equal(cut, last)


def test_a_peaked_layer_cuts_at_once_and_a_flat_one_not_at_all():
    """By entropy: of one-sided attention (n - k) / sqrt(2) go, of even attention none."""
    ctx = sight(["square"], (0, 1, 2))
    seen = ctx.vision[0]
    flat = replace(seen, query=torch.zeros_like(seen.query))
    key = torch.zeros_like(seen.key)
    key[:, :, 5] = 40.0
    peaked = replace(seen, query=torch.ones_like(seen.query), key=key)
    wanted = {}
    for name, layer in (("flat", flat), ("peaked", peaked)):
        wanted[name] = slow_choice(replace(ctx, vision={**ctx.vision, 0: layer}), (0, 1, 2), 0, 36, 6)
        again = replace(ctx, vision={**ctx.vision, 0: layer})
        assert FlowCut(keep=6, vision_layers=(0, 1, 2)).select(again)[0].tolist() == wanted[name]


def test_a_broken_image_keeps_its_first_tokens():
    ctx = sight([FIVE, FIVE], (0, 1, 2))
    value = ctx.vision[1].value.clone()
    value[0] = torch.nan
    broken = replace(ctx, vision={**ctx.vision, 1: replace(ctx.vision[1], value=value)})
    policy = FlowCut(keep=5, vision_layers=(0, 1, 2))
    whole, got = (kept_lists(policy.select(c)) for c in (ctx, broken))
    assert len(got[0]) == 5 and got[1] == whole[1]


def test_positions_and_budget():
    ctx = sight(["square"], (0, 1))
    packed = FlowCut(keep=6, vision_layers=(0, 1), positions="pack").select(ctx)
    assert isinstance(packed, Reduction) and packed.positions == "pack" and packed.index.shape == (1, 6)
    assert FlowCut().kept(576, 1, 0) == 128 and FlowCut().layers == (0,)


def test_needs_values():
    assert FlowCut(vision_layers=[1, 3]).needs(0) == Needs(vision=(1, 3), values=True)
    assert len(FlowCut().needs(0).vision) == 22


def test_says_what_the_wiring_forgot():
    ctx = sight(["square"], (0,))
    bare = replace(ctx, vision={0: replace(ctx.vision[0], value=None)})
    policy = FlowCut(keep=6, vision_layers=(0,))
    with pytest.raises(
        ValueError, match=r"^ctx\.vision: expected values \(declare Needs\(values=True\)\), got"
    ):
        policy.select(bare)
    with pytest.raises(ValueError, match=r"^ctx\.vision\[0\]: expected query and key"):
        policy.select(replace(ctx, vision={}))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"keep": 0.0}, r"^keep: expected a share in \(0, 1\] or a whole number .* >= 1, got 0\.0$"),
        ({"vision_layers": ()}, r"^vision_layers: expected one or more layers, ascending from 0, got \(\)$"),
        ({"vision_layers": (3, 1)}, r"^vision_layers: expected .* ascending from 0, got \(3, 1\)$"),
        ({"vision_layers": (-2,)}, r"^vision_layers: expected .* ascending from 0, got \(-2,\)$"),
        ({"positions": "drop"}, r"^positions: expected 'keep' or 'pack', got 'drop'$"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        FlowCut(**settings)

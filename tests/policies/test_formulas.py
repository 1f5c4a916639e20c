"""The formulas that policies publish: their letters are in the legend, and what they say, computed line by line, is what stays.

Here each is a few lines of PyTorch in double precision, as its text has it, for one prompt of one image. What takes more stands
where the method is tested, and was compared with the text: ``fold_slowly`` (folder, aim's stage 1), ``slow_recycle`` (what
sparsevlm brings back), ``slow`` of test_accm_selection, ``spread_by_loops`` and ``dpp_by_determinants`` (scout),
``slow_choice`` (learned), ``test_the_choice_is_the_selections`` (accm), ``test_equals_the_released_selection`` (sgl),
``test_only_a_token_that_ends_its_prompt_stays`` (vtw).
"""

import ast
import math
import re

import pytest
import torch

from helpers.contexts import top
from vlmprune import policies
from vlmprune.policies import Reduction
from vlmprune.policies.base import SYMBOLS
from vlmprune.policies.lattice import lattice
from vlmprune.policies.registry import BUILT_IN, OURS, fields_of
from vlmprune.testing.context import make_case, rotate, with_text, with_vision

SIDE = 6
n = SIDE * SIDE


def letters(text):
    """Those that stand alone, with indices or as one: ``d_ij`` has three, ``mean_h`` has one."""
    alone = re.findall(r"(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z])", text)
    pairs = re.findall(r"(?<![a-zA-Z])[a-zA-Z]_([a-z]{2})(?![a-zA-Z])", text)
    return {*alone, *"".join(pairs)}


def defined(text):
    """Letters that a formula gives a meaning: those before an equals sign, with their indices or without."""
    return set(re.findall(r"(?<!\w)([a-zA-Z])(?:_\w+|_\{[^}]*\}|\[[^]]*\])? = ", text))


KNOWN = letters(" ".join(SYMBOLS))


def test_letters_and_what_is_defined():
    text = "p[h, j] = mean_h A[K-1][h, last, j] / c_tj;  d_ij² = 2 x_i, where c_tj ≤ 1, x_last = y"
    assert letters(text) == set("phjAKctdixy") and defined(text) == set("pdx")
    assert letters("∑_{t ∈ R} e_j · 10⁻⁶ / 2k") == set("tRejk")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_method_has_one_of_few_short_lines(name):
    lines = BUILT_IN[name].formula.split("\n")
    assert 1 <= len(lines) <= 6
    assert all(line.strip() == line != "" and len(line) <= 100 for line in lines)


@pytest.mark.parametrize("name", BUILT_IN)
def test_letters_are_in_the_legend_or_defined(name):
    """And none of the legend's is given another meaning; a score is defined by each."""
    text, settings = BUILT_IN[name].formula, fields_of(BUILT_IN[name])
    assert letters(text) <= KNOWN | defined(text) | settings.keys()
    assert not defined(text) & KNOWN - {"s"}


def test_the_legend_has_nothing_that_no_formula_uses():
    every = " ".join(kind.formula for kind in BUILT_IN.values())
    words = {*re.findall(r"[^\W_]+", " ".join(SYMBOLS))}
    assert words - {*re.findall(r"[^\W_]+", every)} == set()


@pytest.mark.parametrize("name", BUILT_IN)
def test_settings_named_in_it_are_the_defaults(name):
    """``(rows='last')`` says which way it switches, ``k(then)`` by which setting tokens are counted."""
    text, settings = BUILT_IN[name].formula, fields_of(BUILT_IN[name])
    for said in re.findall(r"\(\w+=(?:[^()]|\([^()]*\))*\)", text):
        for setting in ast.parse(f"f{said}", mode="eval").body.keywords:
            assert settings[setting.arg] == ast.literal_eval(setting.value)
    assert {*re.findall(r"\bk\(([a-z_]+)", text)} <= settings.keys()


def test_what_is_made_of_policies_has_none():
    assert {name for name, kind in OURS.items() if not kind.formula} == OURS.keys() - BUILT_IN.keys()


class Prompt:
    """The legend's symbols for one prompt, float64 on the CPU. ``j`` and ``t`` are the rows of its visual tokens and its text."""

    def __init__(self, layer, seed):
        made = make_case([((SIDE, SIDE),)], layer, seed=seed)
        made = with_vision(with_text(made, seed=seed + 100), (-2, 5), seed=seed + 200)
        self.ctx = ctx = made.ctx
        seen, self._vision = ctx.attention, ctx.vision
        self.j, self.t, self.last = seen.columns[0].cpu(), seen.rows[0].cpu(), int(seen.last)
        self.z = logits(seen.query, seen.key, seen.scale)
        self.A = self.z.masked_fill(torch.ones_like(self.z[0]).triu(1) > 0, -math.inf).softmax(-1)
        self.without_rope = logits(made.query, made.key, seen.scale)
        self.key, self.x, self.text_x = plain(seen.key), plain(ctx.hidden), plain(ctx.text_hidden)
        embeds = plain(ctx.embeds)
        self.e, self.text_e = embeds[ctx.image[0].cpu()], embeds[ctx.text[0].cpu()]
        self.v = plain(ctx.features)

    def norm(self, x):
        return self.ctx.norm(x.to(self.ctx.device).float()).double().cpu()

    def project(self, v):
        return self.ctx.project(v.to(self.ctx.device)).double().cpu()

    def V(self, layer):
        """With CLS: ``[h, 1 + i, 1 + j]``."""
        seen = self._vision[layer]
        return logits(seen.query, seen.key, seen.scale).softmax(-1)

    def among_patches(self, layer):
        seen = self._vision[layer]
        return logits(seen.query[:, :, 1:], seen.key[:, :, 1:], seen.scale).softmax(-1)

    def u(self, layer):
        return plain(self._vision[layer].key)[:, 1:]

    def raters(self):
        """r_t = mean_j softmax_t(e_j · e_t);  R = {t: r_t > mean_t r_t}"""
        r = (self.e @ self.text_e.T).softmax(1).mean(0)
        return self.t[r > r.mean()]


def plain(x):
    return x[0].double().cpu()


def logits(query, key, scale):
    q, k = plain(query), plain(key)
    return q @ k.repeat_interleave(len(q) // len(k), 0).mT * scale


def cos(a, b):
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def best(s, k):
    return top(s.tolist(), k)


def rest_of(kept):
    return [j for j in range(n) if j not in kept]


def fastv(p, k):
    return best(p.A[:, p.last, p.j].mean(0), k)


def feather(p, k):
    s = p.without_rope[:, p.last, p.j].softmax(-1).mean(0)
    grid = [r * SIDE + c for r in range(0, SIDE, 3) for c in range(0, SIDE, 3)]
    return sorted({*best(s, k), *grid})


def feather_again(p, k):
    return best(p.without_rope[:, p.last, p.j].softmax(-1).mean(0), k)


def sparsevlm(p, k):
    return best(p.A[:, p.raters()][:, :, p.j].mean(1).mean(0), k)


def sparsevlm_plus(p, k):
    tables = [table.cpu() for table in p.ctx.attention.rope]
    ones = torch.ones_like(tables[0])[:, None]
    turned, R = plain(rotate(ones, *tables))[0], p.raters()
    c, own = (turned[R] @ turned[p.j].T) / 16**0.5, (turned[0] @ turned[0]) / 16**0.5
    c = torch.where(c <= 0.001 * own, 0.05 * own, c)
    per_head = (p.A[:, R][:, :, p.j] / c).mean(1)
    return best(per_head[best(per_head.sum(1), 2)].mean(0), k)


def dart(p, k):
    strength = p.key.abs().sum((0, 2))
    visual, text = (sorted(range(len(at)), key=lambda i, at=at: -strength[at[i]])[:4] for at in (p.j, p.t))
    places = {int(p.j[i]): ("visual", i) for i in visual} | {int(p.t[i]): ("text", i) for i in text}
    y = {"visual": p.norm(p.x), "text": p.norm(p.text_x)}
    kept = [*visual]
    for place in set(
        [*places]
    ):  # the released order: that in which CPython walks a set filled by falling norm
        kind, i = places[place]
        free = rest_of(kept)
        likeness = cos(y[kind][i : i + 1], y["visual"][free])[0]
        kept += [free[f] for f in best(-likeness, k // 8)]
    return sorted(kept)


def knorm(p, k):
    return best(-p.key[:, p.j].mean(0).norm(dim=1), k)


def greedyprune(p, k):
    s, alike, kept = cos(p.x, p.text_x[-1:])[:, 0], cos(p.x, p.x), []
    order = sorted(range(n), key=lambda j: -s[j])
    for j in order:
        if len(kept) < k and all(alike[i, j] <= 0.3 for i in kept):
            kept.append(j)
    return sorted([*kept, *[j for j in order if j not in kept][: k - len(kept)]])


def ficoco(p, k):
    b = p.z.mean(0)
    bjj, bjt, btj = b[p.j][:, p.j], b[p.j][:, p.t], b[p.t][:, p.j]
    s = (1 - 0.6) * bjt.mean(1) - 0.6 * bjj.sum(1)
    kept = [0, *(1 + i for i in best(s[1:], k - 1))]
    c = (0.6 * bjj + (1 - 0.6) * bjt @ btj).fill_diagonal_(-math.inf)
    x = p.x.clone()
    for i in rest_of(kept):
        highest = best(c[i], n - 1 - math.floor(0.9 * (n - 1)))
        x[highest] += c[i, highest].softmax(0)[:, None] * p.x[i]
    return kept, x[kept]


def vscan(p, k):
    shallow, deep = (p.V(layer)[:, 0, 1:].mean(0) for layer in (5, -2))
    windows = {}
    for j in range(n):
        windows.setdefault((j // SIDE // 3, j % SIDE // 3), []).append(j)
    m = k // 2 // len(windows)
    kept = [window[i] for window in windows.values() for i in best(shallow[window], m)]
    others = rest_of(kept)
    kept = sorted([*kept, *(others[i] for i in best(deep[others], k - len(kept)))])
    dropped = rest_of(kept)
    goes = cos(p.x[dropped], p.x[kept]).argmax(1)
    groups = [[i, *(j for j, to in zip(dropped, goes, strict=True) if to == at)] for at, i in enumerate(kept)]
    return kept, torch.stack([p.x[group].mean(0) for group in groups])


def star(p, k):
    return best(p.among_patches(-2).mean(1).mean(0), k)


def star_again(p, k):
    return best(p.A[:, p.t][:, :, p.j].mean(1).mean(0), k)


def lvlm_csp_clusters(p, k):
    return [i * (n // k) for i in range(k)]


def fastervlm(p, k):
    return best(p.V(-2)[:, 0, 1:].mean(0), k)


def visionzip(p, k):
    s, y = p.V(-2)[:, 0, 1:].mean(0), p.u(-2).mean(0)
    kept = best(s, k)
    others = rest_of(kept)
    targets = others[:: len(others) // 3][:3]
    left = [j for j in others if j not in targets]
    goes, rows = cos(y[left], y[targets]).argmax(1), p.x.clone()
    for at, i in enumerate(targets):
        rows[i] = p.project(p.v[i] + p.v[[j for j, to in zip(left, goes, strict=True) if to == at]].mean(0))
    index = sorted([*kept, *targets])
    return index, rows[index]


def vispruner(p, k):
    s, alike = p.V(-2)[:, 0, 1:].mean(0), cos(p.v, p.v)
    order = sorted(range(n), key=lambda j: -s[j])
    kept, places = order[: k // 2], order[k // 2 :]
    while len(kept) + len(places) > k:
        even, odd = places[0::2], places[1::2]
        falling = sorted(even, key=lambda i: -alike[i, odd].max())
        places = falling[min(8, len(kept) + len(places) - k, len(even)) :] + odd
    return sorted(kept + places)


def aim(p, k):
    """Of the one stage behind the merging."""
    causal = torch.ones_like(p.z[0]).triu(1) > 0
    pays = (p.z / 0.1).masked_fill(causal, -math.inf).softmax(-1)
    share = torch.full_like(pays[:, :1], 1 / pays.shape[1]) @ torch.linalg.matrix_power(pays, 5)
    return best(share[:, 0, p.j].square().mean(0).sqrt(), k)


def divprune(p, k):
    d, kept = 1 - cos(p.x, p.x), []
    kept.append(int(d.clone().fill_diagonal_(math.inf).amin(1).argmax()))
    while len(kept) < k:
        kept.append(max(rest_of(kept), key=lambda j: d[kept, j].min()))
    return sorted(kept)


def cdpruner(p, k):
    c, kept = cos(p.x, p.text_e).mean(1), []
    r = (c - c.min() + 1e-6) / (c.max() - c.min())
    L = r[:, None] * cos(p.x, p.x) * r
    for _ in range(k):
        kept.append(max(rest_of(kept), key=lambda j: torch.linalg.det(L[[*kept, j]][:, [*kept, j]])))
    return sorted(kept)


CASES = [
    ("fastv", dict(keep=0.3), 2, 10, fastv),
    ("feather", dict(layers=(2, 4)), 2, 10, feather),
    ("feather", dict(layers=(2, 4), keep=0.5), 4, 9, feather_again),
    ("pyramiddrop", dict(ratio=0.3), 8, 10, fastv),
    ("sparsevlm", dict(keep=(1, 10, 1)), 7, 10, sparsevlm),
    ("sparsevlm_plus", dict(keep=(1, 10, 1), heads=2), 7, 10, sparsevlm_plus),
    ("dart", dict(keep=20), 2, 20, dart),
    ("knorm", dict(keep=0.3), 2, 10, knorm),
    ("greedyprune", dict(keep=0.3, tau=0.3), 2, 10, greedyprune),
    ("ficoco", dict(drop=14, epsilon=0.9), 6, 22, ficoco),
    ("vscan", dict(keep=12, window=3), 0, 12, vscan),
    ("vscan", dict(then=10), 16, 10, fastv),
    ("star", dict(keep=0.3), 0, 10, star),
    ("star", dict(), 16, 11, star_again),
    ("lvlm_csp", dict(cluster=10), 0, 10, lvlm_csp_clusters),
    ("lvlm_csp", dict(then=0.3), 12, 10, fastv),
    ("fastervlm", dict(keep=10), 0, 10, fastervlm),
    ("visionzip", dict(dominant=9, contextual=3), 0, 9, visionzip),
    ("vispruner", dict(keep=10), 0, 10, vispruner),
    ("aim", dict(layer=14, stages=2), 14, 18, aim),
    ("divprune", dict(keep=0.3), 0, 11, divprune),  # 10.8
    ("cdpruner", dict(keep=5), 0, 5, cdpruner),
]
"""A method, settings, its stage, how many stay by its scores, and what its formula then keeps."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_what_is_computed_as_written_is_what_stays(case, seed):
    name, settings, layer, k, formula = case
    prompt = Prompt(layer, seed)
    choice = BUILT_IN[name](**settings).select(prompt.ctx)
    index = choice.index if isinstance(choice, Reduction) else choice
    expected = formula(prompt, k)
    kept, rows = expected if isinstance(expected, tuple) else (expected, None)
    got = index[0].tolist()
    assert (got[:k] if name == "sparsevlm" else got) == kept
    if rows is not None:
        torch.testing.assert_close(plain(choice.hidden), rows, atol=1e-4, rtol=1e-4)


def test_deep_random_is_random():
    """What is drawn, and where the seed is put in, is the matter of test_random; the formula is one for both."""
    assert policies.RandomDeep.formula == policies.Random.formula


def test_the_lattice():
    """p_j, for the shift of the longest shortest vector."""
    k, period = 16, n / 16
    lines = range(1, 10)

    def shortest(d):
        return min((a * period + b * d) ** 2 + b * b for a in range(-9, 10) for b in (0, *lines) if a or b)

    d = max((period * step / 128 for step in range(65)), key=lambda d: round(shortest(d), 9))
    r, c = torch.arange(n) // SIDE, torch.arange(n) % SIDE
    phase = (c - (SIDE - 1) / 2 + d * (r - (SIDE - 1) / 2) + 1 / 2) * k / n % 1
    assert list(lattice((SIDE, SIDE), k)) == best(-phase.mul(1e6).round(), k)
